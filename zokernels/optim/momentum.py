"""ZO-SGD-MMT: m ← β m + ĝ, θ ← (1 − η·wd)·θ − η m, ĝ = (1/q) Σ dₖ zₖ.

Source: heavy-ball momentum (Polyak, 1964), as in the benchmark of Zhang et al., ICML 2024.
"""

from __future__ import annotations

from typing import Any

import torch

from zokernels import ops, rules
from zokernels.optim.base import ZOOptimizer
from zokernels.optim.groups import mean_coefficients
from zokernels.optim.state import plain_dtype, states_of


class ZOSGDMomentum(ZOOptimizer):
    """Zeroth-order SGD with momentum: state m.

    Args:
        params: As in `ZOOptimizer`, and so are ``lr``, ``eps`` and the common keywords.
        lr: Learning rate η.
        eps: Scale of the perturbation.
        beta: β, 0 … 1.
        state_dtype: Of m: float32 by default (float64 for float64 weights), or
            `torch.bfloat16`, stored by stochastic rounding.
        **common: The keywords of `ZOOptimizer`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        beta: float = 0.9,
        state_dtype: torch.dtype | None = None,
        **common: Any,
    ):
        own = dict(beta=beta, state_dtype=state_dtype)
        super().__init__(params, lr, eps, rule_defaults=own, **common)

    def _check_rule(self, group: dict) -> None:
        rules.numbers("momentum", [0.0], group["beta"], (0.0, 0.0), 0.0, False, None)
        group["state_dtype"] = plain_dtype(group["state_dtype"], group["params"])

    def _update(
        self, group: dict, chosen: list[int], seeds: list[int], gradients: list[float]
    ) -> None:
        params = [group["params"][i] for i in chosen]
        ops.apply_update_(
            params,
            states_of(self, params, rules.state_names("momentum"), group["state_dtype"]),
            "momentum",
            seeds,
            mean_coefficients(group, gradients),
            lr=float(group["lr"]),
            beta=group["beta"],
            **self._pass_options(group, chosen),
        )
