"""Odd values for what is read from files of others, and where in a value they may stand."""

from hypothesis import strategies as st

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "spans", "label", "start", "end", "x"]), inner)
    ),
    max_leaves=6,
)


def places(value, at=()):
    """Every place inside a row, by the path to it."""
    found = [at] if at else []
    if isinstance(value, dict):
        found += [p for key in value for p in places(value[key], (*at, key))]
    if isinstance(value, list):
        found += [p for i, inner in enumerate(value) for p in places(inner, (*at, i))]
    return found
