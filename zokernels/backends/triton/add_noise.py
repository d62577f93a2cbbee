"""w ← round(decay · w + Σₖ cₖ zₖ) for a list of tensors, in one launch.

Its mirror image, round(decay · w − Σₖ cₖ zₖ), comes from the same draw where a plan asks for it.
"""

import triton
import triton.language as tl

from zokernels.backends.plan import AddNoise
from zokernels.backends.triton import arithmetic, launch, table
from zokernels.backends.triton.arithmetic import narrow, nearest, stochastic, widen
from zokernels.backends.triton.group import (
    CELLS,
    KEEP_ALL,
    KEEP_MAGNITUDE,
    add_scaled,
    address,
    begin,
    inside,
    is_whole,
    keep_small,
    keep_static,
    load,
    number,
    of_rows,
    places,
    scaled_noise,
    store,
    uniform16,
)  # fmt: skip
from zokernels.backends.triton.noise import ROUNDING
from zokernels.noise import GAUSSIAN


@triton.jit
def _group(
    row_ptr, start, row, column, numbers_ptr, seeds, queries,
    DTYPE: tl.constexpr, MEMORY_TYPE: tl.constexpr, KIND: tl.constexpr, KEEP_KIND: tl.constexpr,
    STOCHASTIC: tl.constexpr, STEPS: tl.constexpr, DECAY: tl.constexpr, SMALL: tl.constexpr,
    MIRROR: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One group. ``numbers``: seeds, then their coefficients, then of each step decay and seed."""
    place = places(row_ptr, KIND, ROWS, WHOLE)
    here = inside(row_ptr, start, row, column, KIND, ROWS)
    raw = load(address(row_ptr, 0, start, MEMORY_TYPE, WHOLE), place, here, WHOLE)
    weight = widen(raw, DTYPE)
    if KEEP_KIND != KEEP_ALL and KEEP_KIND != KEEP_MAGNITUDE:
        keep = keep_static(row_ptr, start, place, here, KEEP_KIND, KIND, ROWS, WHOLE)
    coeffs_ptr = numbers_ptr + seeds
    decays_ptr = coeffs_ptr + seeds
    steps = seeds // queries if STEPS else 1
    other = weight
    for step in range(steps):
        if KEEP_KIND == KEEP_MAGNITUDE:
            keep = keep_small(row_ptr, weight)
        acc = weight * number(decays_ptr + step) if DECAY else weight
        other = acc
        first = step * queries
        for k in range(first, first + queries):
            seed = tl.load(numbers_ptr + k)
            z = scaled_noise(row_ptr, start, column, seed, KIND, SMALL, ROWS)
            coeff = of_rows(number(coeffs_ptr + k), row_ptr, row, seed, KIND, ROWS)
            acc = add_scaled(acc, z, coeff, KIND)
            if MIRROR:
                other = add_scaled(other, z, -coeff, KIND)
        if STOCHASTIC:
            seed = tl.load(decays_ptr + steps + step)
            u = uniform16(row_ptr, start, place, seed, ROUNDING, KIND, ROWS, WHOLE)
            acc = stochastic(acc, u, DTYPE)
        elif STEPS:
            acc = nearest(acc, DTYPE)
        weight = acc if KEEP_KIND == KEEP_ALL else tl.where(keep, acc, weight)
    result = narrow(weight, DTYPE)
    if KEEP_KIND != KEEP_ALL:
        # A NaN stays one whatever is added, so it may keep its bits, and outside the mask it must.
        original = widen(raw, DTYPE)
        result = tl.where(original == original, result, raw)
    store(address(row_ptr, 1, start, MEMORY_TYPE, WHOLE), place, result, here, WHOLE)
    if MIRROR:
        result = narrow(other, DTYPE)
        store(address(row_ptr, 2, start, MEMORY_TYPE, WHOLE), place, result, here, WHOLE)


@triton.jit(do_not_specialize=["seeds", "queries"])
def _add_noise_kernel(
    groups_ptr, table_ptr, numbers_ptr, seeds, queries,
    DTYPE: tl.constexpr, MEMORY_TYPE: tl.constexpr, KIND: tl.constexpr, KEEP_KIND: tl.constexpr,
    STOCHASTIC: tl.constexpr, STEPS: tl.constexpr, DECAY: tl.constexpr, SMALL: tl.constexpr,
    MIRROR: tl.constexpr, ROWS: tl.constexpr, GUARD: tl.constexpr = 0,
):  # fmt: skip
    """A program takes one group of one tensor.

    ``groups``: int32, the tensor of each program. ``table``: int64 (tensors, CELLS).
    ``numbers``: int64, see `_group`. ``seeds``: K. ``queries``: seeds a step. ``GUARD``: where in
    the numbers behind the coefficients it says whether to write; 0 for nowhere.
    """
    if GUARD:
        if tl.load(numbers_ptr + 2 * seeds + GUARD) == 0:
            return
    program = tl.program_id(0)
    row_ptr = table_ptr + tl.load(groups_ptr + program).to(tl.int64) * CELLS
    start, row, column = begin(row_ptr, program, KIND, ROWS)
    if is_whole(row_ptr, start, row, column, KIND, ROWS):
        _group(row_ptr, start, row, column, numbers_ptr, seeds, queries, DTYPE, MEMORY_TYPE, KIND,
               KEEP_KIND, STOCHASTIC, STEPS, DECAY, SMALL, MIRROR, ROWS, True)  # fmt: skip
    else:
        _group(row_ptr, start, row, column, numbers_ptr, seeds, queries, DTYPE, MEMORY_TYPE, KIND,
               KEEP_KIND, STOCHASTIC, STEPS, DECAY, SMALL, MIRROR, ROWS, False)  # fmt: skip


def add_noise(plan: AddNoise) -> None:
    """Run the pass: one launch for all tensors of a type."""
    for part in table.by_type(plan, [p.dtype for p in plan.params]):
        _launch(part).run()


def prepare_add_noise(plan: AddNoise, deferred: launch.Deferred) -> list[launch.Launch]:
    """The launches of a pass whose numbers are read in memory when it runs."""
    parts = table.by_type(plan, [p.dtype for p in plan.params])
    return [_launch(part, deferred) for part in parts]


def _launch(plan: AddNoise, deferred: launch.Deferred | None = None) -> launch.Launch:
    device, dtype = plan.params[0].device, table.TYPES[plan.params[0].dtype]
    mirror = bool(plan.mirror)
    shape = launch.shape_of_add_noise(plan.kind, launch.is_plain(plan), mirror)
    memories = [plan.params, plan.out, *([plan.mirror] if mirror else [])]
    tensors = table.table_of(plan, memories, shape.rows * 8)
    if deferred is None:
        coeffs, small = launch.coefficients(plan)
        numbers = table.numbers_of(plan, coeffs, device=device)
        decays, guard = any(d != 1 for d in plan.decays), 0
    else:
        # Nobody here knows how small a coefficient will be.
        numbers, decays, small, guard = *deferred, plan.kind == GAUSSIAN, 2
    options = dict(
        DTYPE=dtype, MEMORY_TYPE=arithmetic.memory_type(dtype), KIND=plan.kind,
        KEEP_KIND=tensors.keep_kind, STOCHASTIC=plan.stochastic, STEPS=plan.steps > 1,
        DECAY=decays, SMALL=small, MIRROR=mirror, ROWS=shape.rows, GUARD=guard, **shape.options,
    )  # fmt: skip
    given = (tensors.groups, tensors.rows, numbers, len(plan.seeds), plan.queries)
    return launch.Launch(_add_noise_kernel, tensors.programs, device, given, options)
