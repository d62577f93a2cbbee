"""Where the checks of a GPU run: on it, or, to try them out, interpreted on the CPU.

With ZOKERNELS_GPU_DRY=1 and TRITON_INTERPRET=1 the same tests run on CPU tensors with interpreted
kernels, a few cases of each kind: an interpreted program takes 50 ms, whatever its size.
"""

import itertools
import os

import pytest
import torch
from conftest import bits, same_bits

from zokernels import noise

DRY = os.environ.get("ZOKERNELS_GPU_DRY") == "1"
DEVICE = "cpu" if DRY else "cuda"
DISTS = list(noise.KINDS)
marks = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (DRY or torch.cuda.is_available()),
        reason="needs a CUDA device; bench/on_gpu.sh check runs it there",
    ),
]


def some(cases, few=2):
    """All cases; tried out, ``few`` of them from the first to the last."""
    cases = list(cases)
    if not DRY or len(cases) <= few:
        return cases
    return [cases[place * (len(cases) - 1) // max(1, few - 1)] for place in range(few)]


def spread(share, *axes):
    """Every ``share``-th of the combinations, so that all pairs of values still meet.

    A combination is taken where its values' places add up to a multiple of the share.
    """
    return [
        tuple(axis[place] for axis, place in zip(axes, places, strict=True))
        for places in itertools.product(*(range(len(axis)) for axis in axes))
        if sum(places) % share == 0
    ]


def to_device(tensors):
    """Copies on the device at the same distance from an aligned address."""
    out = []
    for t in tensors:
        shift = t.storage_offset()
        whole = torch.zeros(shift + t.numel(), dtype=t.dtype, device=DEVICE)
        out.append(whole[shift:].view(t.shape).copy_(t))
    return out


def states_to_device(states):
    return [{name: t.to(DEVICE, copy=True) for name, t in state.items()} for state in states]


def assert_same(expected, got):
    """Equal bit for bit; if not, where and how: a GPU is not always at hand to look again."""
    for place, (e, g) in enumerate(zip(expected, got, strict=True)):
        e, g = e.detach().cpu().flatten(), g.detach().cpu().flatten()
        if same_bits(e, g):
            continue
        differ = ((bits(e) != bits(g)) & ~(e.isnan() & g.isnan())).nonzero().flatten()
        first = differ[:4]
        pytest.fail(
            f"tensor {place}, {e.numel()} elements of {e.dtype}: {len(differ)} differ, first at "
            f"{first.tolist()}: expected {e[first].tolist()} ({bits(e)[first].tolist()}), got "
            f"{g[first].tolist()} ({bits(g)[first].tolist()})",
            pytrace=False,
        )
