"""g = Σₖ cₖ zₖ through a rule with state, for a list of tensors, in one launch."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from zokernels.backends.plan import ApplyUpdate
from zokernels.backends.triton import arithmetic, launch, table
from zokernels.backends.triton.arithmetic import (
    bits_of,
    float_of,
    narrow,
    widen,
)  # fmt: skip
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
)  # fmt: skip
from zokernels.backends.triton.rules import ADAM, AMSGRAD, MOMENTUM, take_step
from zokernels.noise import GAUSSIAN

_RULES = {"sign": 0, "momentum": 1, "adam": 2}


@triton.jit
def _load(
    row_ptr, WHICH: tl.constexpr, start, place, here, DTYPE: tl.constexpr,
    MEMORY_TYPE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    pointer = address(row_ptr, WHICH, start, MEMORY_TYPE, WHOLE)
    return load(pointer, place, here, WHOLE)


@triton.jit
def _store(
    row_ptr, WHICH: tl.constexpr, start, place, here, x, DTYPE: tl.constexpr,
    MEMORY_TYPE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    pointer = address(row_ptr, WHICH, start, MEMORY_TYPE, WHOLE)
    store(pointer, place, narrow(x, DTYPE), here, WHOLE)


@triton.jit
def _gradient(
    zero, numbers_ptr, seeds, first, queries, row_ptr, start, row, column,
    KIND: tl.constexpr, SMALL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient g of the step whose first seed is number ``first``."""
    g = zero
    for k in range(first, first + queries):
        seed = tl.load(numbers_ptr + k)
        z = scaled_noise(row_ptr, start, column, seed, KIND, SMALL, ROWS)
        coeff = of_rows(number(numbers_ptr + seeds + k), row_ptr, row, seed, KIND, ROWS)
        g = add_scaled(g, z, coeff, KIND)
    return g


@triton.jit
def _group(
    row_ptr, start, row, column, numbers_ptr, seeds, queries,
    DTYPE: tl.constexpr, MEMORY_TYPE: tl.constexpr, M_TYPE: tl.constexpr, M_MEMORY: tl.constexpr,
    V_TYPE: tl.constexpr, V_MEMORY: tl.constexpr, X_TYPE: tl.constexpr, X_MEMORY: tl.constexpr,
    RULE: tl.constexpr, KIND: tl.constexpr, KEEP_KIND: tl.constexpr, STOCHASTIC: tl.constexpr,
    STEPS: tl.constexpr, DECAY: tl.constexpr, SMALL: tl.constexpr, ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """One group. ``numbers``: seeds, their coefficients, and what `take_step` reads."""
    place = places(row_ptr, KIND, ROWS, WHOLE)
    here = inside(row_ptr, start, row, column, KIND, ROWS)
    raw = _load(row_ptr, 0, start, place, here, DTYPE, MEMORY_TYPE, WHOLE)
    weight = widen(raw, DTYPE)
    # Zeros in the layout of the weights: plain ones would have another, and each round of the loop
    # over seeds would move the sum through shared memory (4 instructions a weight).
    zero = float_of((bits_of(weight).to(tl.uint64) >> 32).to(tl.uint32))
    if not STEPS:
        # Before the states are loaded, so that they don't wait in registers for the noise.
        g = _gradient(
            zero, numbers_ptr, seeds, 0, queries, row_ptr, start, row, column, KIND, SMALL, ROWS
        )
    m, v, x, keep = weight, weight, weight, here
    if RULE >= MOMENTUM:
        m = widen(_load(row_ptr, 1, start, place, here, M_TYPE, M_MEMORY, WHOLE), M_TYPE)
    if RULE >= ADAM:
        v = widen(_load(row_ptr, 2, start, place, here, V_TYPE, V_MEMORY, WHOLE), V_TYPE)
    if RULE == AMSGRAD:
        x = widen(_load(row_ptr, 3, start, place, here, X_TYPE, X_MEMORY, WHOLE), X_TYPE)
    MASKED: tl.constexpr = KEEP_KIND != KEEP_ALL
    if MASKED and KEEP_KIND != KEEP_MAGNITUDE:
        keep = keep_static(row_ptr, start, place, here, KEEP_KIND, KIND, ROWS, WHOLE)
    decays_ptr = numbers_ptr + 2 * seeds
    if STEPS:
        steps = seeds // queries
        for step in range(steps):
            g = _gradient(
                zero, numbers_ptr, seeds, step * queries, queries, row_ptr, start, row, column,
                KIND, SMALL, ROWS,
            )  # fmt: skip
            if KEEP_KIND == KEEP_MAGNITUDE:
                keep = keep_small(row_ptr, weight)
            weight, m, v, x = take_step(
                g, weight, m, v, x, keep, row_ptr, start, place, decays_ptr, step, steps,
                DTYPE, M_TYPE, V_TYPE, RULE, MASKED, STOCHASTIC, STEPS, DECAY, KIND, ROWS, WHOLE,
            )  # fmt: skip
    else:
        if KEEP_KIND == KEEP_MAGNITUDE:
            keep = keep_small(row_ptr, weight)
        weight, m, v, x = take_step(
            g, weight, m, v, x, keep, row_ptr, start, place, decays_ptr, 0, 1, DTYPE, M_TYPE,
            V_TYPE, RULE, MASKED, STOCHASTIC, STEPS, DECAY, KIND, ROWS, WHOLE,
        )  # fmt: skip
    result = narrow(weight, DTYPE)
    if MASKED:
        # A NaN stays one whatever is added, so it may keep its bits, and outside the mask it must.
        original = widen(raw, DTYPE)
        result = tl.where(original == original, result, raw)
    store(address(row_ptr, 0, start, MEMORY_TYPE, WHOLE), place, result, here, WHOLE)
    if RULE >= MOMENTUM:
        _store(row_ptr, 1, start, place, here, m, M_TYPE, M_MEMORY, WHOLE)
    if RULE >= ADAM:
        _store(row_ptr, 2, start, place, here, v, V_TYPE, V_MEMORY, WHOLE)
    if RULE == AMSGRAD:
        _store(row_ptr, 3, start, place, here, x, X_TYPE, X_MEMORY, WHOLE)


@triton.jit(do_not_specialize=["seeds", "queries"])
def _apply_update_kernel(
    groups_ptr, table_ptr, numbers_ptr, seeds, queries,
    DTYPE: tl.constexpr, MEMORY_TYPE: tl.constexpr, M_TYPE: tl.constexpr, M_MEMORY: tl.constexpr,
    V_TYPE: tl.constexpr, V_MEMORY: tl.constexpr, X_TYPE: tl.constexpr, X_MEMORY: tl.constexpr,
    RULE: tl.constexpr, KIND: tl.constexpr, KEEP_KIND: tl.constexpr, STOCHASTIC: tl.constexpr,
    STEPS: tl.constexpr, DECAY: tl.constexpr, SMALL: tl.constexpr, ROWS: tl.constexpr,
    GUARD: tl.constexpr = 0,
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
        _group(
            row_ptr, start, row, column, numbers_ptr, seeds, queries, DTYPE, MEMORY_TYPE, M_TYPE,
            M_MEMORY, V_TYPE, V_MEMORY, X_TYPE, X_MEMORY, RULE, KIND, KEEP_KIND, STOCHASTIC, STEPS,
            DECAY, SMALL, ROWS, True,
        )  # fmt: skip
    else:
        _group(
            row_ptr, start, row, column, numbers_ptr, seeds, queries, DTYPE, MEMORY_TYPE, M_TYPE,
            M_MEMORY, V_TYPE, V_MEMORY, X_TYPE, X_MEMORY, RULE, KIND, KEEP_KIND, STOCHASTIC, STEPS,
            DECAY, SMALL, ROWS, False,
        )  # fmt: skip


def apply_update(plan: ApplyUpdate) -> None:
    """Run the pass: one launch for all tensors of a type whose states have one type, too."""
    for part in _by_type(plan):
        _launch(part).run()


def prepare_apply_update(plan: ApplyUpdate, deferred: launch.Deferred) -> list[launch.Launch]:
    """The launches of a pass whose numbers are read in memory when it runs."""
    return [_launch(part, deferred) for part in _by_type(plan)]


def _by_type(plan: ApplyUpdate) -> Iterator[ApplyUpdate]:
    types = [
        (p.dtype, *(s.dtype for s in states))
        for p, states in zip(plan.params, plan.states, strict=True)
    ]
    return table.by_type(plan, types)


def _launch(plan: ApplyUpdate, deferred: launch.Deferred | None = None) -> launch.Launch:
    device, dtype = plan.params[0].device, table.TYPES[plan.params[0].dtype]
    memories = [plan.params, *zip(*plan.states, strict=True)]
    kinds = [table.TYPES[s.dtype] for s in plan.states[0]]
    kinds += [dtype] * (3 - len(kinds))
    wide = plan.params[0].dtype is torch.float32
    shape = launch.shape_of_update(plan.kind, plan.rule, wide)
    tensors = table.table_of(plan, memories, shape.rows * 8)
    if deferred is None:
        coeffs, small = launch.coefficients(plan)
        more = (plan.rates, plan.scales, plan.of_rule)
        numbers = table.numbers_of(plan, coeffs, *more, device=device)
        decays, guard = any(d != 1 for d in plan.decays), 0
    else:
        # Nobody here knows how small a coefficient will be.
        numbers, decays, small, guard = *deferred, plan.kind == GAUSSIAN, 9
    options = dict(
        DTYPE=dtype, MEMORY_TYPE=arithmetic.memory_type(dtype),
        M_TYPE=kinds[0], M_MEMORY=arithmetic.memory_type(kinds[0]),
        V_TYPE=kinds[1], V_MEMORY=arithmetic.memory_type(kinds[1]),
        X_TYPE=kinds[2], X_MEMORY=arithmetic.memory_type(kinds[2]),
        RULE=_RULES[plan.rule] + plan.amsgrad, KIND=plan.kind, KEEP_KIND=tensors.keep_kind,
        STOCHASTIC=plan.stochastic, STEPS=plan.steps > 1, DECAY=decays, SMALL=small,
        ROWS=shape.rows, GUARD=guard, **shape.options,
    )  # fmt: skip
    given = (tensors.groups, tensors.rows, numbers, len(plan.seeds), plan.queries)
    return launch.Launch(_apply_update_kernel, tensors.programs, device, given, options)
