"""The keywords of the ops: each is said once, and has its default where it is checked."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, TypeVar

from zokernels import masks

F = TypeVar("F", bound=Callable[..., None])


class PassKeywords(TypedDict, total=False):
    """What every op takes besides tensors, seeds and coefficients.

    Attributes:
        streams: The number of each tensor's noise stream; by default its position in ``params``.
        offsets: Where each tensor starts in its whole, row-major parameter; by default 0. A shard
            gets the noise of its part.
        columns: Of ``"rank1"`` only: how many columns each tensor's whole parameter has, 0 if that
            has fewer than two dimensions. By default, and where it is None, as the tensor's own
            shape says (`zokernels.noise.rank1`); a shard that is a plain tensor needs its
            parameter's.
        dist: ``"gaussian"`` (the default), ``"rademacher"`` or ``"rank1"``.
        mask: One of `zokernels.masks`; elements outside it stay as they are, and so do states.
        decay: Factor on the weight before the noise; with ``each_step`` one for all or one a step.
            By default 1.
        rounding: Of the weight: ``"nearest"`` (the default; ties to even) or ``"stochastic"``
            (16-bit types only).
        rounding_seed: Seed of stochastic rounding; with ``each_step`` one for all or one a step.
        each_step: Apply decay, mask and rounding for every seed in turn, as K calls would: the
            replay of K steps in one pass over memory. A number q > 1 makes each q seeds a step.
        backend: ``None`` (the best for the device), ``"reference"``, ``"native"`` or ``"triton"``.
    """

    streams: Sequence[int] | None
    offsets: Sequence[int] | None
    columns: Sequence[int | None] | None
    dist: str
    mask: masks.Mask | None
    decay: float | Sequence[float]
    rounding: str
    rounding_seed: int | Sequence[int]
    each_step: bool | int
    backend: str | None


class RuleKeywords(PassKeywords, total=False):
    """What `apply_update_` takes besides.

    Attributes:
        beta: β of "momentum", 0 … 1; by default 0.9.
        betas: (β₁, β₂) of "adam", 0 … 1, below 1 where ``step`` is given; by default (0.9, 0.999).
        adam_eps: ϵ of "adam", at least 0; by default 1e-8.
        amsgrad: Divide by the largest v so far.
        step: The number t ≥ 1 of this step, for Adam's bias correction: lr is divided by 1 − β₁ᵗ
            and v̂ multiplied by 1/(1 − β₂ᵗ), each computed in binary64 and rounded once. With
            ``each_step`` the first step's number. None corrects nothing.
    """

    beta: float
    betas: tuple[float, float]
    adam_eps: float
    amsgrad: bool
    step: int | None


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The keywords of a function that have a default, and what that is."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def takes(*described: Callable[..., Any]) -> Callable[[F], F]:
    """Gives an op the keywords of what checks them, and "backend"; refuses others."""
    known = {"backend": None} | {k: v for f in described for k, v in defaults(f).items()}

    def give(op: F) -> F:
        *own, _ = inspect.signature(op).parameters.values()
        names = [p.name for p in own]

        @functools.wraps(op)
        def run(*args: Any, **given: Any) -> None:
            for name in given:
                if name not in known and name not in names:
                    raise TypeError(
                        f"{op.__name__}() got an unexpected keyword argument {name!r}; it takes "
                        f"{', '.join([*names, *known])}."
                    )
            op(*args, **{**known, **given})

        taken = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
            for name, default in known.items()
        ]
        run.__signature__ = inspect.Signature([*own, *taken])  # type: ignore[attr-defined]
        return run  # type: ignore[return-value]

    return give
