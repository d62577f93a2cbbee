"""Shifts of products along a direction of rank one: cases, and what they must be."""

import torch

from zokernels.backends.plan import Shift

# Less than a vector, a tile of each instruction set and one more, rows of models.
SIZES = [(1, 1), (7, 9), (64, 65), (129, 128), (768, 300), (1000, 2311)]


def case(lanes, rows, width, out, dtype, bias, device="cpu"):
    """Arguments of a shift; its vectors are parts of one tensor, as far apart as that says."""
    generator = torch.Generator().manual_seed(width)

    # As they lie among those of other matrices.
    both = torch.randn(lanes, width + out + 5, generator=generator).sign().to(dtype)
    x = torch.randn(lanes, rows, width, generator=generator).to(dtype)
    shape = {"none": None, "common": (out,), "each": (lanes, out)}[bias]
    b = None if shape is None else torch.randn(shape, generator=generator).to(dtype)
    scales = torch.randn(lanes, generator=generator) * 0.1
    x, both, scales, b = (None if t is None else t.to(device) for t in (x, both, scales, b))
    return x, both[:, 3 : width + 3], both[:, width + 3 : -2], scales, b


def run(backend, *given):
    """What a backend makes of a case."""
    plan = Shift.of(*given)
    backend.shift(plan)
    return plan.y


def exact(x, taken, given, scales, bias):
    x, taken, given, scales = (t.double() for t in (x, taken, given, scales))
    y = scales.view(-1, 1, 1) * torch.einsum("lri,li,lo->lro", x, taken, given)
    if bias is None:
        return y
    return y + (bias if bias.dim() == 1 else bias.unsqueeze(1)).double()


def assert_rounded_once(y, x, *others):
    """It is the exact sum, but for what float32's sums are off by, rounded once."""
    expected = exact(x, *others)
    assert y.shape == expected.shape and y.dtype is x.dtype
    # Half a place of the type's, and what float32's sums of so many terms are off by.
    places = torch.finfo(x.dtype).eps / 2 * expected.abs()
    sums = 0.1 * x.shape[2] * torch.finfo(torch.float32).eps
    assert ((y - expected).abs() <= places + sums).all()
