"""Passes and shifts as the reference makes them, in a file that golden.cpp reads."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from conftest import varied
from test_ops import DISTS, DTYPES, mask_of, of_rank1
from test_update import RULES, states_of

import zokernels as zk
from zokernels import masks, ops
from zokernels.backends import native, reference
from zokernels.backends.plan import AddNoise, ApplyUpdate, Shift

SOURCE = Path(__file__).with_suffix(".cpp")
MASKS = ("none", "random", "magnitude", "bits")
ROUNDINGS = ("nearest", "stochastic")

# Less than a tile, where the high word of a counter changes within one, and several tiles.
SIZES, COLUMNS = [1, 31, 33, 515], [0, 5, 768, 7]
OFFSETS, STREAMS = [3, 2**35 - 4, 2**40 + 5, 129], [5, 2**32 - 1, 0, 1]

# Those of a training step: rows that lie whole in it, several at a time, and the rest of one.
LONG, LONG_COLUMNS = [4099, 130], [770, 32]
EXACT = [1e-3, -0.5, 0.25]
# The last one times 2⁻²⁹ is not exact in binary32, and goes another way.
TINY = [1e-3, -0.5, 2e-30]


# Whose rounding carries into the sign, and one that signals.
ODD_NAN = {
    torch.float32: (0x7FFFFFFF, 0x7F800001),
    torch.bfloat16: (0x7FFF, 0x7F81),
    torch.float16: (0x7FFF, 0x7C01),
}


class Writer:
    """Writes cases to a file and counts them."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.count = 0

    def passes(self, name: str, plan: AddNoise | ApplyUpdate) -> None:
        """A pass and what the reference makes of it; a mirror has the coefficients turned."""
        args = native.arguments(plan)
        states = plan.states if isinstance(plan, ApplyUpdate) else [()] * len(plan.params)
        before = [_bytes(p) for p in plan.params]
        states_before = [[_bytes(s) for s in mine] for mine in states]
        mirrors = [b""] * len(before)
        if isinstance(plan, AddNoise):
            if plan.mirror:
                turned = [-c for c in plan.coeffs]
                fields = {**vars(plan), "coeffs": turned, "out": plan.mirror, "mirror": ()}
                reference.add_noise(AddNoise(**fields))
                mirrors = [_bytes(m) for m in plan.mirror]
            reference.add_noise(plan)
            after = [_bytes(t) for t in plan.out]
        else:
            reference.apply_update(plan)
            after = [_bytes(p) for p in plan.params]
        self._blobs(b"pass", name.encode(), bytes(args))
        for field in ("seeds", "coeffs", "decays", "rounding_seeds", "rates", "scales"):
            pointer = getattr(args, field)
            length = len(plan.seeds) if field in ("seeds", "coeffs") else plan.steps
            kind = getattr(pointer, "_type_", None)
            self._blobs(bytes((kind * length)(*pointer[:length])) if pointer else b"")
        for i, mine in enumerate(states):
            mask = plan.masks[i]
            packed = _bytes(mask.packed) if isinstance(mask, masks.BitsOf) else b""
            self._blobs(bytes(args.tensors[i]), before[i], after[i], mirrors[i], packed)
            for s in range(3):
                here = s < len(mine)
                self._blobs(states_before[i][s] if here else b"", _bytes(mine[s]) if here else b"")
        self.count += 1

    def shift(self, name: str, plan: Shift) -> None:
        """A shift whose sums are exact, so that their order is of no matter."""
        sums = torch.einsum("lri,li->lr", plan.x.double(), plan.taken.double())
        scaled = plan.scales.unsqueeze(1) * sums.float()
        assert torch.equal(sums.float().double(), sums)
        bias = 0 if plan.bias is None else plan.bias.float()
        bias = bias if plan.bias_step == 0 else bias.unsqueeze(1)
        exact = bias + scaled.unsqueeze(2) * plan.given.float().unsqueeze(1)
        plan.y.copy_(exact.to(plan.y.dtype))
        # What lies between the lanes' signs comes with them.
        signs = [
            ctypes.string_at(t.data_ptr(), ((len(t) - 1) * t.stride(0) + t.shape[1]) * t.itemsize)
            for t in (plan.taken, plan.given)
        ]
        args = native.shift_arguments(plan)
        bias_bytes = b"" if plan.bias is None else _bytes(plan.bias)
        self._blobs(b"shift", name.encode(), bytes(args), _bytes(plan.x), *signs, bias_bytes)
        self._blobs(_bytes(plan.scales), _bytes(plan.y))
        self.count += 1

    def _blobs(self, *blobs: bytes) -> None:
        for blob in blobs:
            self._file.write(len(blob).to_bytes(8, "little") + blob)


def write(path: Path) -> int:
    """Writes every case; returns how many there are."""
    with path.open("wb") as file:
        writer = Writer(file)
        for name, call in itertools.chain(additions(), updates()):
            with _to(writer, name):
                call()
        for name, plan in mirrored():
            writer.passes(name, plan)
        for name, shift in shifts():
            writer.shift(name, shift)
    return writer.count


def additions() -> Iterator[tuple[str, Any]]:
    """Every type, distribution, mask and rounding, once and in steps; and what a step runs."""
    number = 0
    for dtype, dist in itertools.product(DTYPES, DISTS):
        for mask, rounding, each in itertools.product(MASKS, ROUNDINGS, (False, True)):
            number += 1
            plain = mask == "none" and rounding == "nearest"
            for coeffs in (TINY, EXACT) if plain else (TINY,):
                long = coeffs is EXACT
                how = _keywords(number, LONG if long else SIZES, dtype, dist, mask, rounding, each)
                tensors = how.pop("tensors")
                name = f"{dtype} {dist} {mask} {rounding} {'steps' if each else 'once'} {coeffs}"
                call = dict(params=tensors, coeffs=coeffs, seeds=_seeds(number, 3), **how)
                yield f"add_noise_ {name}", lambda call=call: zk.ops.add_noise_(**call)
    # Below 2⁻¹⁴ a conversion that rounds in place of cutting shows at one in 2¹⁷ elements.
    tiny = torch.zeros(300_000, dtype=torch.float16)
    how = dict(rounding="stochastic", backend="reference")
    yield "add_noise_ tiny halves", lambda: zk.ops.add_noise_([tiny], [5], [1e-6], **how)


def updates() -> Iterator[tuple[str, Any]]:
    """Every rule, type, type of state and distribution, with masks and roundings in turns."""
    number = 0
    turns = itertools.cycle(itertools.product(MASKS, ROUNDINGS, (0, 2)))
    states = (torch.float32, torch.bfloat16)
    for rule, dtype, state, dist in itertools.product(RULES, DTYPES, states, DISTS):
        if rule == "sign" and state is not torch.float32:
            continue
        # Two of the sixteen turns each, and others for each rule, type and distribution.
        for mask, rounding, each in (next(turns), *itertools.islice(turns, 4, 5)):
            number += 1
            how = _keywords(number, SIZES, dtype, dist, mask, rounding, each)
            tensors = how.pop("tensors")
            lr = [0.01, 0.03] if each else 0.02
            how.update(
                params=tensors, states=_odd_states(rule, tensors, state), lr=lr,
                seeds=_seeds(number, 4), coeffs=[*(EXACT if number % 2 else TINY), 0.25],
            )  # fmt: skip
            name = f"{rule} {dtype} {state} {dist} {mask} {rounding} each_step={each}"
            call = {**how, **RULES[rule]}
            yield f"apply_update_ {name}", lambda call=call: zk.ops.apply_update_(**call)


def mirrored() -> Iterator[tuple[str, AddNoise]]:
    """Both sides of a difference from one draw."""
    cases = itertools.product(DTYPES, DISTS, (TINY, EXACT))
    for number, (dtype, dist, coeffs) in enumerate(cases, start=1):
        how = _keywords(number, SIZES, dtype, dist, "none", "nearest", False)
        how.pop("backend")
        tensors = how.pop("tensors")
        taken: list[AddNoise] = []
        with ops.taking(lambda run, plan, taken=taken: taken.append(plan)):
            zk.ops.add_noise_(tensors, _seeds(number, 3), coeffs, backend="reference", **how)
        fields = vars(taken[0])
        outs = [[torch.empty_like(t) for t in tensors] for _ in range(2)]
        plan = AddNoise(**{**fields, "out": outs[0], "mirror": outs[1]})
        yield f"mirrored {dtype} {dist} {coeffs}", plan


def shifts() -> Iterator[tuple[str, Shift]]:
    """Every type and kind of bias; less than a vector, than a tile, and rows of a model."""
    sizes = [(1, 1), (7, 9), (64, 65), (129, 33), (768, 300)]
    for dtype, bias, (width, out) in itertools.product(DTYPES, ("none", "common", "each"), sizes):
        generator = torch.Generator().manual_seed(width)
        lanes, rows = 2, 3
        both = torch.randn(lanes, width + out + 5, generator=generator).sign().to(dtype)
        # Eighths between −4 and 4: sums of so many of them are exact.
        x = (torch.randint(-32, 33, (lanes, rows, width), generator=generator) / 8).to(dtype)
        shape = {"none": None, "common": (out,), "each": (lanes, out)}[bias]
        b = None if shape is None else torch.randn(shape, generator=generator).to(dtype)
        scales = torch.randn(lanes, generator=generator) * 0.1
        plan = Shift.of(x, both[:, 3 : width + 3], both[:, width + 3 : -2], scales, b)
        yield f"shift {dtype} {bias} {width} by {out}", plan


def _keywords(
    number: int, sizes: list[int], dtype: torch.dtype, dist: str, mask: str, rounding: str,
    each: bool | int,
) -> dict[str, Any]:  # fmt: skip
    tensors = [_odd(varied(size, dtype, number + i)) for i, size in enumerate(sizes)]
    steps = {False: 1, True: 3, 2: 2}[each]
    long = sizes is LONG
    return dict(
        tensors=tensors, streams=STREAMS[: len(sizes)], offsets=OFFSETS[: len(sizes)], dist=dist,
        mask=mask_of(mask, tensors), rounding=rounding, each_step=each, backend="reference",
        decay=[0.99, 1.0, 0.5][:steps] if each else (1.0 if number % 3 else 0.99),
        rounding_seed=[77, 2**64 - 1, number][:steps] if each else 2**64 - number,
        **of_rank1(dist, LONG_COLUMNS if long else COLUMNS),
    )  # fmt: skip


def _odd(t: torch.Tensor) -> torch.Tensor:
    kind = torch.int32 if t.dtype is torch.float32 else torch.int16
    for start, bits in zip((11, 40), ODD_NAN[t.dtype], strict=True):
        t.view(kind)[start::67] = bits
    return t


def _odd_states(
    rule: str, tensors: list[torch.Tensor], dtype: torch.dtype
) -> list[dict[str, torch.Tensor]]:
    """States of which each is NaN somewhere where the others are not."""
    states = states_of(rule, tensors, dtype)
    for state in states:
        for place, t in enumerate(state.values()):
            rolled = _odd(t.roll(-7 * place)).roll(7 * place)
            t.copy_(rolled)
            t[25 + place :: 97] = float("inf")
    return states


def _seeds(number: int, count: int) -> list[int]:
    return [number, 2**63 + number, 2**32 - number, 2**64 - number][:count]


@contextlib.contextmanager
def _to(writer: Writer, name: str) -> Iterator[None]:
    with ops.taking(lambda run, plan: writer.passes(name, plan)):
        yield


def _bytes(t: torch.Tensor) -> bytes:
    assert t.is_contiguous()
    return ctypes.string_at(t.data_ptr(), t.numel() * t.itemsize)
