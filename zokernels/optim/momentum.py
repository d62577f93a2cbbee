"""ZO-SGD-MMT: m ← β m + ĝ, θ ← (1 − η·wd)·θ − η m, ĝ = (1/q) Σ dₖ zₖ.

Without a buffer, m is made again from the last W steps' seeds in the pass that updates:

    θ ← (1 − η·wd)·θ − η Σ_{j<W} βʲ ĝ_{t−j}

What this drops of m is βᵂ m_{t−W}: with β = 0.9 and W = 32 some 3.4% of it, and as much of the
whole effect that each ĝ has. The pass makes W·q directions instead of q.

Source: heavy-ball momentum (Polyak, 1964), as in the benchmark of Zhang et al., ICML 2024.
"""

from __future__ import annotations

from typing import Any

import torch

from zokernels import passes
from zokernels.backends import rules
from zokernels.optim.base import ZOOptimizer
from zokernels.optim.groups import mean_coefficients
from zokernels.optim.state import plain_dtype, states_of
from zokernels.trajectory import TrajectoryError

WINDOW = 32


class ZOSGDMomentum(ZOOptimizer):
    """Zeroth-order SGD with momentum: state m, or with ``window`` none but the last steps' seeds.

    Args:
        params: As in `ZOOptimizer`, and so are ``lr``, ``eps`` and the common keywords.
        lr: Learning rate η.
        eps: Scale of the perturbation.
        beta: β, 0 … 1.
        state_dtype: Of m: float32 by default (float64 for float64 weights), or
            `torch.bfloat16`, stored by stochastic rounding.
        window: Keep no m, and sum the last W steps anew: their number W, or True for 32. The
            directions of all W steps go through the present step's mask; when ``sparsity`` draws
            a new mask, the sum starts afresh.
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
        window: int | bool | None = None,
        **common: Any,
    ):
        own = dict[str, Any](beta=beta, state_dtype=state_dtype, window=window, history=[])
        super().__init__(params, lr, eps, rule_defaults=own, **common)

    def _check_rule(self, group: dict) -> None:
        rules.numbers("momentum", [0.0], beta=group["beta"])
        group["state_dtype"] = plain_dtype(group["state_dtype"], group["params"])
        window = group["window"]
        if isinstance(window, bool):
            window = WINDOW if window else None
        if window is not None and (not isinstance(window, int) or window < 1):
            raise ValueError(f"window is {window!r}, but it must be None, True or at least 1 step.")
        if window and group["state_dtype"]:
            raise ValueError(
                f"state_dtype is {group['state_dtype']} and window is {window}, but with a window "
                "there is no state; give one of the two."
            )
        group["window"] = window

    def _check_resumable(self) -> None:
        if any(group["window"] for group in self.param_groups):
            raise TrajectoryError(
                "Momentum with a window can't be resumed from a trajectory, which has its steps' "
                "coefficients only as the passes took them; resume from a state_dict, or use "
                "window=None. A replay of the weights works."
            )

    def _update(
        self, group: dict, chosen: list[int], seeds: list[int], gradients: list[float]
    ) -> None:
        if group["window"]:
            self._update_from_history(group, chosen, seeds, gradients)
        else:
            self._update_buffer(group, chosen, seeds, gradients)

    def _update_from_history(
        self, group: dict, chosen: list[int], seeds: list[int], gradients: list[float]
    ) -> None:
        mask = group["mask"] and group["mask"].get("seed")
        now = dict(seeds=seeds, coefficients=mean_coefficients(group, gradients), mask=mask)
        past = [s for h in group["history"] if h["params"] == chosen for s in h["steps"]]
        # Oldest first. New lists each time: a state_dict taken before holds the old ones.
        steps = [*(s for s in past if s["mask"] == mask), now][-group["window"] :]
        others = [h for h in group["history"] if not set(h["params"]) & set(chosen)]
        oldest = len(steps) - 1
        passes.add_noise_(
            [group["params"][i] for i in chosen],
            [seed for step in steps for seed in step["seeds"]],
            [
                -float(group["lr"]) * group["beta"] ** (oldest - j) * c
                for j, step in enumerate(steps)
                for c in step["coefficients"]
            ],
            **self._pass_options(group, chosen),
        )
        group["history"] = [*others, dict(params=chosen, steps=steps)]

    def _update_buffer(
        self, group: dict, chosen: list[int], seeds: list[int], gradients: list[float]
    ) -> None:
        params = [group["params"][i] for i in chosen]
        passes.apply_update_(
            params,
            states_of(self, params, rules.state_names("momentum"), group["state_dtype"]),
            "momentum",
            seeds,
            mean_coefficients(group, gradients),
            lr=float(group["lr"]),
            beta=group["beta"],
            **self._pass_options(group, chosen),
        )
