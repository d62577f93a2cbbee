"""Trajectories that say nonsense under right checksums: refused whole, or replayed whole."""

import copy
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from odd import JSON, places
from test_trajectory import Two, X, equal, weights

import zokernels as zk
from zokernels.trajectory import format as form

RUNS = {
    "sgd": (zk.ZOSGD, dict(num_queries=2, mask=zk.masks.Magnitude(0.4))),
    "sparse": (zk.ZOSGD, dict(sparsity=0.3, resample_every=1)),
    "adam": (zk.ZOAdam, dict(amsgrad=False, bias_correction=True)),
    "rank1": (zk.ZOSGDSign, dict(dist="rank1", num_queries=2)),
}
ODD = JSON | st.sampled_from([-1, 2**32, 2**64, 2**80, 1e39, 1e400, "cauchy", "float64", True])


def frames(data):
    """(kind, payload) of each frame of a file."""
    found, at = [], len(form.MAGIC)
    while at < len(data):
        length = int.from_bytes(data[at + 1 : at + 5], "little")
        found.append((data[at : at + 1], data[at + form.HEAD_SIZE :][:length]))
        at += form.FRAME_SIZE + length
    return found


@pytest.fixture(scope="module", params=RUNS)
def recorded(request, tmp_path_factory):
    kind, options = RUNS[request.param]
    path = tmp_path_factory.mktemp("forged") / "run.zk"
    model = Two()
    base = copy.deepcopy(model)
    opt = kind(model, lr=0.05, seed=3, **options)
    opt.record(path)
    for _ in range(4):
        opt.step(lambda: model(X))
    opt.trajectory.close()
    return path, frames(path.read_bytes()), base


@st.composite
def forged(draw, payload, is_json):
    """The payload with a value, or some bytes, replaced."""
    if is_json:
        value = json.loads(payload)
        for _ in range(draw(st.integers(1, 2))):
            *at, last = draw(st.sampled_from(places(value) or [("x",)]))
            inner = value
            for key in at:
                inner = inner[key]
            if isinstance(inner, dict) and draw(st.integers(0, 4)) == 0:
                inner.pop(last, None)
                inner["unheard of"] = draw(ODD)
            else:
                inner[last] = draw(ODD)
        return json.dumps(value).encode()
    changed = bytearray(payload)
    for _ in range(draw(st.integers(1, 3))):
        changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
    return bytes(changed[: draw(st.sampled_from([len(changed), len(changed) - 1]))])


@pytest.mark.filterwarnings("ignore:The last record of")
@given(data=st.data())
def test_what_is_forged_is_refused_whole(recorded, data):
    path, known, base = recorded
    place = data.draw(st.integers(0, len(known) - 1))
    content, check = form.MAGIC, 0
    for i, (kind, payload) in enumerate(known):
        if i == place:
            payload = data.draw(forged(payload, kind in (form.HEADER, form.PASS)))
        frame, check = form.frame(kind, payload, check)
        content += frame
    copied = path.with_name("forged.zk")
    copied.write_bytes(content)
    model = copy.deepcopy(base)
    try:
        zk.replay(model, copied)
    except zk.TrajectoryError as error:
        assert len(str(error)) > 30
        assert equal(weights(model), weights(base))


@pytest.mark.parametrize("recorded", ["adam"], indirect=True)
def test_a_pass_that_would_be_refused_late_is_refused_before_the_first(recorded):
    path, known, base = recorded
    last = max(i for i, (kind, _) in enumerate(known) if kind == form.STEP)
    step = form.unpack_step(known[last][1], False)
    scalars = [*step.passes]
    # Finite in binary64, and not in binary32.
    forged_step = form.Step(step.number, (*scalars[:-1], replace(scalars[-1], lr=1e300)))
    content, check = form.MAGIC, 0
    for i, (kind, payload) in enumerate(known):
        if i == last:
            payload = form.pack_step(forged_step, False)
        frame, check = form.frame(kind, payload, check)
        content += frame
    copied = path.with_name("late.zk")
    copied.write_bytes(content)
    model = copy.deepcopy(base)
    with pytest.raises(zk.TrajectoryError, match="finite in binary32"):
        zk.replay(model, copied, chunk=1)
    assert equal(weights(model), weights(base))
