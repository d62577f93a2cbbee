"""Directions of rank one: which row and column an element has, and what it draws there."""

import math

import pytest
import torch
from test_noise_exact import block_words

from zokernels import noise

WHERE = {"seed": 2**63 + 12345, "stream": 2**32 - 1}


def sign(kind, place, seed, stream):
    """A bit of a block as ±1, on Python integers."""
    word = block_words(kind, seed, stream, place // 128)[place % 128 // 32]
    return 2 * (word >> place % 32 & 1) - 1


def element(index, columns, seed, stream):
    """An element of a direction, by docs/noise.md: kind 4 by row and 5 by column, or kind 1."""
    if columns == 0:
        return sign(1, index, seed, stream)
    row, column = index // columns, index % columns
    return sign(4, row, seed, stream) * sign(5, column, seed, stream)


# Shape, and its rows and columns.
MATRICES = [
    ((3, 5), 3, 5),
    ((1, 1), 1, 1),
    ((1, 300), 1, 300),
    ((300, 1), 300, 1),
    ((130, 257), 130, 257),
    ((4, 3, 5), 12, 5),
    ((1, 1, 129), 1, 129),
    ((6, 2, 3, 4), 6, 24),
    ((1, 2, 3, 4), 1, 24),
    ((129, 1, 1, 1), 129, 1),
    ((3, 2, 2, 2, 11), 3, 88),
    ((2, 0), 2, 0),
    ((0, 2), 0, 2),
    ((0, 2, 3, 4), 0, 24),
]


@pytest.mark.parametrize(("shape", "rows", "columns"), MATRICES, ids=str)
def test_a_shape_is_read_as_a_matrix(shape, rows, columns):
    z = noise.rank1(shape, **WHERE)
    assert z.shape == shape and z.dtype == torch.float32
    assert noise.columns_of(shape) == noise.columns_of(torch.Size(shape)) == columns
    left = torch.tensor([sign(4, i, **WHERE) for i in range(rows)])
    right = torch.tensor([sign(5, j, **WHERE) for j in range(columns)])
    assert torch.equal(z.view(rows, columns), torch.outer(left, right).float())


@pytest.mark.parametrize("shape", [(), (1,), (0,), (300,)], ids=str)
def test_without_two_dimensions_it_has_a_sign_an_element(shape):
    z = noise.rank1(shape, **WHERE)
    assert z.shape == shape and noise.columns_of(shape) == 0
    assert torch.equal(z.flatten(), noise.rademacher(math.prod(shape), **WHERE))


@pytest.mark.parametrize(
    ("columns", "offset"),
    [
        pytest.param(7, 0, id="from-0"),
        pytest.param(7, 3, id="in-a-row"),
        pytest.param(128, 128 * 127, id="columns-of-a-block"),
        pytest.param(131, 131 * 127 + 125, id="last-columns-of-a-row"),
        pytest.param(1, 128 * 2**32 - 77, id="row-s-block-needs-its-high-word"),
        pytest.param(2**41, 128 * 2**32 - 77, id="column-s-block-needs-its-high-word"),
        pytest.param(2**40, 2**40 * (128 * 2**15) - 77, id="rows-beyond-2**22"),
        pytest.param(2**32 + 1, (2**32 + 1) * (2**30 + 128) - 77, id="both-beyond-32-bits"),
        pytest.param(2**63 - 1, 2**63 - 202, id="last-columns-there-are"),
        pytest.param(1, 2**63 - 202, id="last-rows-there-are"),
        pytest.param(0, 128 * 2**32 - 77, id="no-matrix"),
    ],
)
def test_a_part_has_the_signs_of_its_place(columns, offset):
    got = noise.signs_of_rank1(201, columns, **WHERE, offset=offset, device="cpu")
    expected = [element(offset + i, columns, **WHERE) for i in range(201)]
    assert got.dtype == torch.float32 and got.tolist() == expected
    assert {*expected} == {1, -1}


@pytest.mark.parametrize("shape", [(9, 17), (3, 4, 5), (5, 2, 3, 3), (40,)], ids=str)
def test_shards_of_a_parameter_are_slices_of_it(shape):
    whole = noise.rank1(shape, **WHERE).flatten()
    columns = noise.columns_of(shape)
    for start in range(len(whole)):
        for end in {start, start + 1, start + columns, start + columns + 1, len(whole)}:
            size = min(end, len(whole)) - start
            part = noise.signs_of_rank1(size, columns, **WHERE, offset=start, device="cpu")
            assert torch.equal(part, whole[start : start + size])


def test_a_seed_s_rows_columns_and_elements_are_three_draws():
    # Else a square matrix would be symmetric, and a bias tied to its layer.
    signs = {kind: [sign(kind, i, **WHERE) for i in range(128)] for kind in (1, 4, 5)}
    assert len({tuple(s) for s in signs.values()}) == 3
    assert len({tuple(-x for x in s) for s in signs.values()} & {*map(tuple, signs.values())}) == 0
    z = noise.rank1((128, 128), **WHERE)
    assert not torch.equal(z, z.T) and not torch.equal(z, -z.T)


def test_the_example_of_the_page():
    """The last table of "A block worked through" in docs/noise.md."""
    seed = 1 + (2 << 32)
    left, right = "0d67e37f 69a39523 322e015b 9ea04956", "f4b87e50 3a5403f9 633d7025 26a4d5c5"
    for kind, words in ((4, left), (5, right)):
        assert block_words(kind, seed, 0, 0) == [int(w, 16) for w in words.split()]
    z = noise.rank1((8, 5), seed=seed)
    assert z[:7].tolist() == [[-1, -1, -1, -1, 1]] * 7 and z[7].tolist() == [1, 1, 1, 1, -1]
    assert z.flatten()[33:38].tolist() == [-1, 1, 1, 1, 1]


def test_settings_of_torch_change_nothing():
    expected = noise.rank1((5, 70), **WHERE)
    before = torch.get_rng_state()
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        wide = noise.rank1((5, 70), **WHERE)
    finally:
        torch.set_default_dtype(default)
    with torch.inference_mode():
        inferred = noise.rank1((5, 70), **WHERE)
    for got in (wide, inferred, noise.rank1([5, 70], **WHERE)):
        assert got.dtype == torch.float32 and torch.equal(got, expected)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "shape", [5, "ab", None, (2.0, 3), (2, None), (2, -1), (-2, -3), (0, -3)], ids=str
)
def test_a_shape_that_is_none_is_named(shape):
    with pytest.raises(ValueError, match="^shape is .*, but it must be a list of sizes, as .*\\.$"):
        noise.rank1(shape, seed=1)


@pytest.mark.parametrize(
    ("name", "value"), [("seed", -1), ("seed", 2**64), ("seed", 1.0), ("stream", 2**32)]
)
@pytest.mark.parametrize("shape", [(3, 4), (3,), (0, 4)], ids=str)
def test_arguments_out_of_range_are_named(shape, name, value):
    with pytest.raises(ValueError, match=rf"^{name} is {value}, but .*\.$"):
        noise.rank1(shape, **{"seed": 1, name: value})


def test_there_are_no_elements_from_2_to_the_63_on():
    with pytest.raises(ValueError, match=rf"^numel is {2**63}, but .*\.$"):
        noise.rank1((2**32, 2**31), seed=1)
    with pytest.raises(ValueError, match=rf"^offset \+ numel is {2**63}, but .*\.$"):
        noise.signs_of_rank1(9, 3, seed=1, stream=0, offset=2**63 - 9, device="cpu")
