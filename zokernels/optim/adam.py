"""ZO-Adam: ZO-AdaMM by default, that is AMSGrad without bias correction.

    m ← β₁ m + (1 − β₁) ĝ        v ← β₂ v + (1 − β₂) ĝ²        v̂ ← max(v̂, v)
    θ ← (1 − η·wd)·θ − η m / (√v̂ + ϵ)

``amsgrad=False, bias_correction=True`` is Adam: v̂ = v / (1 − β₂ᵗ), and η over 1 − β₁ᵗ.

Source: ZO-AdaMM (Chen et al., NeurIPS 2019, Algorithm 1); AMSGrad (Reddi et al., ICLR 2018); Adam
(Kingma and Ba, ICLR 2015).
"""

from __future__ import annotations

from typing import Any

import torch

from zokernels import passes
from zokernels.backends import rules
from zokernels.optim.base import ZOOptimizer
from zokernels.optim.groups import mean_coefficients
from zokernels.optim.state import plain_dtype, states_of


class ZOAdam(ZOOptimizer):
    """Zeroth-order Adam: state m and v, and v_max with AMSGrad.

    Args:
        params: As in `ZOOptimizer`, and so are ``lr``, ``eps`` and the common keywords.
        lr: Learning rate η.
        eps: Scale of the perturbation. Adam's own ϵ is ``adam_eps``.
        betas: (β₁, β₂), 0 … 1; below 1 with bias correction.
        adam_eps: ϵ, at least 0.
        amsgrad: Divide by the root of the largest v so far.
        bias_correction: Undo the pull of the states' start at 0.
        state_dtype: Of the states: float32 by default (float64 for float64 weights), or
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
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        amsgrad: bool = True,
        bias_correction: bool = False,
        state_dtype: torch.dtype | None = None,
        **common: Any,
    ):
        own = dict(
            betas=betas,
            adam_eps=adam_eps,
            amsgrad=amsgrad,
            bias_correction=bias_correction,
            state_dtype=state_dtype,
        )
        super().__init__(params, lr, eps, rule_defaults=own, **common)

    def _check_rule(self, group: dict) -> None:
        first = 1 if group["bias_correction"] else None
        numbers = {name: group[name] for name in ("betas", "adam_eps")}
        rules.numbers("adam", [0.0], **numbers, step=first)
        group["state_dtype"] = plain_dtype(group["state_dtype"], group["params"])

    def _update(
        self, group: dict, chosen: list[int], seeds: list[int], gradients: list[float]
    ) -> None:
        params = [group["params"][i] for i in chosen]
        names = rules.state_names("adam", group["amsgrad"])
        states = states_of(self, params, names, group["state_dtype"])
        for step, alike in self._by_step(group, states).items():
            passes.apply_update_(
                [params[j] for j in alike],
                [states[j] for j in alike],
                "adam",
                seeds,
                mean_coefficients(group, gradients),
                lr=float(group["lr"]),
                betas=group["betas"],
                adam_eps=group["adam_eps"],
                amsgrad=group["amsgrad"],
                step=step,
                **self._pass_options(group, [chosen[j] for j in alike]),
            )

    def _by_step(self, group: dict, states: list[dict[str, Any]]) -> dict[int | None, list[int]]:
        """Positions by the number of the update, which bias correction counts for each parameter.

        One pass takes all of them, unless a parameter was frozen for some steps. A step with a
        loss that is not finite does not count: it leaves the states alone.
        """
        if not group["bias_correction"]:
            return {None: list(range(len(states)))}
        found: dict[int | None, list[int]] = {}
        for j, state in enumerate(states):
            state["step"] = state.get("step", 0) + 1
            found.setdefault(state["step"], []).append(j)
        return found
