"""g = Σₖ cₖ zₖ through a rule with state, for a list of tensors, in one launch.

The rules are device functions: the gradient and the states before a step in, the states after it
and the direction d of w ← fma(−lr, d, decay·w) out.
"""

import triton
import triton.language as tl

from zokernels import noise as _noise
from zokernels.backends.plan import ApplyUpdate
from zokernels.backends.triton import arithmetic, launch, noise, table
from zokernels.backends.triton.arithmetic import (
    bits_of, divide, float_of, fma, narrow, nearest, sqrt, stochastic, widen,
)  # fmt: skip
from zokernels.backends.triton.group import (
    ALIGNED, COLUMNS, END, FIRST_GROUP, FIRST_INDEX, KEEP_ALL, KEEP_MAGNITUDE, LEAD, STREAM,
    add_noise_to, address, blocks, keep_small, keep_static, load, number, places, store,
)  # fmt: skip
from zokernels.backends.triton.noise import ROUNDING

SIGN = tl.constexpr(0)
MOMENTUM = tl.constexpr(1)
ADAM = tl.constexpr(2)
AMSGRAD = tl.constexpr(3)
_RULES = {"sign": 0, "momentum": 1, "adam": 2}


@triton.jit
def _sign(g):
    counts = (g > 0) | (g < 0)
    return tl.where(counts, float_of((bits_of(g) & 0x80000000) | 0x3F800000), 0.0)


@triton.jit
def _store_rounded(x, index, stream, seed, DTYPE: tl.constexpr, ROWS: tl.constexpr):
    """A new state as its type holds it: a 16-bit state is always rounded stochastically."""
    if DTYPE == tl.float32:
        return x
    else:
        low, high = blocks(index, 8, ROWS)
        u = noise.uniform16(low, high, stream, ROUNDING, seed)
        return stochastic(x, u, DTYPE)


@triton.jit
def _state(
    row_ptr, WHICH: tl.constexpr, start, inside, DTYPE: tl.constexpr, MEMORY_TYPE: tl.constexpr,
    ROWS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    return widen(load(address(row_ptr, WHICH, start, MEMORY_TYPE, WHOLE), inside, ROWS, WHOLE), DTYPE)


@triton.jit
def _keep_state(
    row_ptr, WHICH: tl.constexpr, start, inside, x, DTYPE: tl.constexpr,
    MEMORY_TYPE: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    pointer = address(row_ptr, WHICH, start, MEMORY_TYPE, WHOLE)
    store(pointer, narrow(x, DTYPE), inside, ROWS, WHOLE)


@triton.jit
def _group(
    row_ptr, start, numbers_ptr, seeds, queries, beta1, rest1, beta2, rest2, adam_eps,
    DTYPE: tl.constexpr, MEMORY_TYPE: tl.constexpr, M_TYPE: tl.constexpr, M_MEMORY: tl.constexpr,
    V_TYPE: tl.constexpr, V_MEMORY: tl.constexpr, X_TYPE: tl.constexpr, X_MEMORY: tl.constexpr,
    RULE: tl.constexpr, KIND: tl.constexpr, KEEP_KIND: tl.constexpr, STOCHASTIC: tl.constexpr,
    STEPS: tl.constexpr, SMALL: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One group. ``numbers``: as for add_noise, then of each step −lr and the factor on v̂."""
    index = tl.load(row_ptr + FIRST_INDEX) + start
    stream = tl.load(row_ptr + STREAM)
    place = start + places(ROWS)
    inside = (place >= tl.load(row_ptr + LEAD)) & (place < tl.load(row_ptr + END))
    raw = load(address(row_ptr, 0, start, MEMORY_TYPE, WHOLE), inside, ROWS, WHOLE)
    weight = widen(raw, DTYPE)
    m = weight
    v = weight
    x = weight
    if RULE >= MOMENTUM:
        m = _state(row_ptr, 1, start, inside, M_TYPE, M_MEMORY, ROWS, WHOLE)
    if RULE >= ADAM:
        v = _state(row_ptr, 2, start, inside, V_TYPE, V_MEMORY, ROWS, WHOLE)
    if RULE == AMSGRAD:
        x = _state(row_ptr, 3, start, inside, X_TYPE, X_MEMORY, ROWS, WHOLE)
    if KEEP_KIND != KEEP_ALL and KEEP_KIND != KEEP_MAGNITUDE:
        keep = keep_static(row_ptr, index, start, inside, KEEP_KIND, ROWS)
    coeffs_ptr = numbers_ptr + seeds
    decays_ptr = coeffs_ptr + seeds
    steps = seeds // queries if STEPS else 1
    roundings_ptr = decays_ptr + steps
    rates_ptr = roundings_ptr + steps
    for step in range(steps):
        g = tl.zeros((ROWS, 8), tl.float32)
        first = step * queries
        for k in range(first, first + queries):
            seed = tl.load(numbers_ptr + k)
            g = add_noise_to(g, index, stream, seed, number(coeffs_ptr + k), KIND, SMALL, ROWS)
        rounding = tl.load(roundings_ptr + step)
        new_m, new_v, new_x = m, v, x
        if RULE == SIGN:
            direction = _sign(g)
        elif RULE == MOMENTUM:
            new_m = _store_rounded(fma(m, beta1, g), index, stream, rounding + 1, M_TYPE, ROWS)
            direction = new_m
        else:
            new_m = fma(m, beta1, g * rest1)
            new_m = _store_rounded(new_m, index, stream, rounding + 1, M_TYPE, ROWS)
            new_v = fma(v, beta2, g * rest2 * g)
            new_v = _store_rounded(new_v, index, stream, rounding + 2, V_TYPE, ROWS)
            divisor = new_v
            if RULE == AMSGRAD:
                new_x = tl.where(new_v > x, new_v, x)
                divisor = new_x
            scale = number(rates_ptr + steps + step)
            direction = divide(new_m, sqrt(divisor * scale) + adam_eps)
        acc = fma(direction, number(rates_ptr + step), weight * number(decays_ptr + step))
        if KEEP_KIND == KEEP_MAGNITUDE:
            keep = keep_small(row_ptr, weight)
        if STOCHASTIC:
            low, high = blocks(index, 8, ROWS)
            u = noise.uniform16(low, high, stream, ROUNDING, rounding)
            acc = stochastic(acc, u, DTYPE)
        elif STEPS:
            acc = nearest(acc, DTYPE)
        if KEEP_KIND == KEEP_ALL:
            weight, m, v, x = acc, new_m, new_v, new_x
        else:
            weight = tl.where(keep, acc, weight)
            m = tl.where(keep, new_m, m)
            v = tl.where(keep, new_v, v)
            x = tl.where(keep, new_x, x)
    result = narrow(weight, DTYPE)
    if KEEP_KIND != KEEP_ALL:
        # Outside the mask a NaN keeps its own bits, which a conversion might not.
        result = tl.where(keep, result, raw)
    store(address(row_ptr, 0, start, MEMORY_TYPE, WHOLE), result, inside, ROWS, WHOLE)
    if RULE >= MOMENTUM:
        _keep_state(row_ptr, 1, start, inside, m, M_TYPE, M_MEMORY, ROWS, WHOLE)
    if RULE >= ADAM:
        _keep_state(row_ptr, 2, start, inside, v, V_TYPE, V_MEMORY, ROWS, WHOLE)
    if RULE == AMSGRAD:
        _keep_state(row_ptr, 3, start, inside, x, X_TYPE, X_MEMORY, ROWS, WHOLE)


@triton.jit(do_not_specialize=["seeds", "queries"])
def _apply_update_kernel(
    groups_ptr, table_ptr, numbers_ptr, seeds, queries, beta1, rest1, beta2, rest2, adam_eps,
    DTYPE: tl.constexpr, MEMORY_TYPE: tl.constexpr, M_TYPE: tl.constexpr, M_MEMORY: tl.constexpr,
    V_TYPE: tl.constexpr, V_MEMORY: tl.constexpr, X_TYPE: tl.constexpr, X_MEMORY: tl.constexpr,
    RULE: tl.constexpr, KIND: tl.constexpr, KEEP_KIND: tl.constexpr, STOCHASTIC: tl.constexpr,
    STEPS: tl.constexpr, SMALL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program takes one group of one tensor.

    Args:
        groups_ptr: int32, the tensor of each program.
        table_ptr: int64 (tensors, COLUMNS).
        numbers_ptr: int64; see `_group`.
        seeds: K.
        queries: Seeds a step.
        beta1, rest1, beta2, rest2, adam_eps: float32; rest is 1 − β.
        DTYPE … ROWS: What is compiled.
    """
    program = tl.program_id(0)
    row_ptr = table_ptr + tl.load(groups_ptr + program).to(tl.int64) * COLUMNS
    start = (program - tl.load(row_ptr + FIRST_GROUP)) * (ROWS * 8)
    whole = (start >= tl.load(row_ptr + LEAD)) & (start + ROWS * 8 <= tl.load(row_ptr + END))
    if whole & (tl.load(row_ptr + ALIGNED) != 0):
        _group(row_ptr, start, numbers_ptr, seeds, queries, beta1, rest1, beta2, rest2, adam_eps,
               DTYPE, MEMORY_TYPE, M_TYPE, M_MEMORY, V_TYPE, V_MEMORY, X_TYPE, X_MEMORY, RULE,
               KIND, KEEP_KIND, STOCHASTIC, STEPS, SMALL, ROWS, True)  # fmt: skip
    else:
        _group(row_ptr, start, numbers_ptr, seeds, queries, beta1, rest1, beta2, rest2, adam_eps,
               DTYPE, MEMORY_TYPE, M_TYPE, M_MEMORY, V_TYPE, V_MEMORY, X_TYPE, X_MEMORY, RULE,
               KIND, KEEP_KIND, STOCHASTIC, STEPS, SMALL, ROWS, False)  # fmt: skip


def apply_update(plan: ApplyUpdate) -> None:
    """Run the pass: one launch for all tensors of a type whose states have one type, too."""
    types = [
        (p.dtype, *(s.dtype for s in states))
        for p, states in zip(plan.params, plan.states, strict=True)
    ]
    for part in table.by_type(plan, types):
        _launch(part)


def _launch(plan: ApplyUpdate) -> None:
    device, dtype = plan.params[0].device, table.TYPES[plan.params[0].dtype]
    memories = [plan.params, *zip(*plan.states, strict=True)]
    kinds = [table.TYPES[s.dtype] for s in plan.states[0]]
    kinds += [dtype] * (3 - len(kinds))
    shape = launch.UPDATE if plan.kind == _noise.GAUSSIAN else launch.SIGNS_GENERAL
    tensors = table.table_of(plan, memories, shape.rows * 8)
    coeffs, small = launch.coefficients(plan)
    numbers = table.numbers_of(plan, coeffs, plan.rates, plan.scales, device=device)
    launch.run(
        _apply_update_kernel, tensors.programs, device,
        tensors.groups, tensors.rows, numbers, len(plan.seeds), plan.queries,
        plan.beta1, plan.one_minus_beta1, plan.beta2, plan.one_minus_beta2, plan.adam_eps,
        DTYPE=dtype, MEMORY_TYPE=arithmetic.memory_type(dtype),
        M_TYPE=kinds[0], M_MEMORY=arithmetic.memory_type(kinds[0]),
        V_TYPE=kinds[1], V_MEMORY=arithmetic.memory_type(kinds[1]),
        X_TYPE=kinds[2], X_MEMORY=arithmetic.memory_type(kinds[2]),
        RULE=_RULES[plan.rule] + plan.amsgrad, KIND=plan.kind, KEEP_KIND=tensors.keep_kind,
        STOCHASTIC=plan.stochastic, STEPS=plan.steps > 1, SMALL=small, ROWS=shape.rows,
        num_warps=shape.warps,
    )  # fmt: skip
