"""The update rules as device functions.

In go a gradient, the weight and its states before a step; out come weight and states after it.
"""

import triton
import triton.language as tl

from zokernels.backends.triton.arithmetic import (
    bits_of,
    divide,
    float_of,
    fma,
    nearest,
    sqrt,
    stochastic,
)
from zokernels.backends.triton.group import number, uniform16
from zokernels.backends.triton.noise import ROUNDING

SIGN = tl.constexpr(0)
MOMENTUM = tl.constexpr(1)
ADAM = tl.constexpr(2)
AMSGRAD = tl.constexpr(3)


@triton.jit
def _sign(g):
    return tl.where(tl.abs(g) > 0, float_of((bits_of(g) & 0x80000000) | 0x3F800000), 0.0)


@triton.jit
def _stored(
    x, row_ptr, start, place, seed, DTYPE: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """A new state as its type holds it: a 16-bit state is always rounded stochastically."""
    if DTYPE == tl.float32:
        return x
    else:
        u = uniform16(row_ptr, start, place, seed, ROUNDING, KIND, ROWS, WHOLE)
        return stochastic(x, u, DTYPE)


@triton.jit
def take_step(
    g, weight, m, v, x, keep, row_ptr, start, place, decays_ptr, step, steps,
    DTYPE: tl.constexpr, M_TYPE: tl.constexpr, V_TYPE: tl.constexpr, RULE: tl.constexpr,
    MASKED: tl.constexpr, STOCHASTIC: tl.constexpr, STEPS: tl.constexpr, DECAY: tl.constexpr,
    KIND: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Weight and states after a step.

    ``decays``: of each step decay, rounding seed, −lr, factor on v̂; then β₁, 1 − β₁, β₂, 1 − β₂, ϵ.
    """
    rounding = tl.load(decays_ptr + steps + step)
    rate = number(decays_ptr + 2 * steps + step)
    rule_ptr = decays_ptr + 4 * steps
    new_m, new_v, new_x = m, v, x
    if RULE == SIGN:
        direction = _sign(g)
    elif RULE == MOMENTUM:
        new_m = fma(m, number(rule_ptr), g)
        new_m = _stored(
            new_m, row_ptr, start, place, rounding + 1, M_TYPE, KIND, ROWS, WHOLE
        )  # fmt: skip
        direction = new_m
    else:
        new_m = fma(m, number(rule_ptr), g * number(rule_ptr + 1))
        new_m = _stored(
            new_m, row_ptr, start, place, rounding + 1, M_TYPE, KIND, ROWS, WHOLE
        )  # fmt: skip
        new_v = fma(v, number(rule_ptr + 2), g * number(rule_ptr + 3) * g)
        new_v = _stored(
            new_v, row_ptr, start, place, rounding + 2, V_TYPE, KIND, ROWS, WHOLE
        )  # fmt: skip
        divisor = new_v
        if RULE == AMSGRAD:
            new_x = tl.where(new_v > x, new_v, x)
            divisor = new_x
        scale = number(decays_ptr + 3 * steps + step)
        direction = divide(new_m, sqrt(divisor * scale) + number(rule_ptr + 4))
    acc = weight * number(decays_ptr + step) if DECAY else weight
    acc = fma(direction, rate, acc)
    if STOCHASTIC:
        u = uniform16(row_ptr, start, place, rounding, ROUNDING, KIND, ROWS, WHOLE)
        acc = stochastic(acc, u, DTYPE)
    elif STEPS:
        acc = nearest(acc, DTYPE)
    if MASKED:
        acc = tl.where(keep, acc, weight)
        new_m = tl.where(keep, new_m, m)
        new_v = tl.where(keep, new_v, v)
        new_x = tl.where(keep, new_x, x)
    return acc, new_m, new_v, new_x
