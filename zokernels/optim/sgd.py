"""ZO-SGD: θ ← (1 − η·wd)·θ − η ĝ, ĝ = (1/q) Σ dₖ zₖ, in one pass over the weights.

Source: MeZO (Malladi et al., NeurIPS 2023, Algorithm 1); ZO-SGD of Ghadimi and Lan, SIAM J. Optim.
2013.
"""

from __future__ import annotations

from zokernels import passes
from zokernels.optim.base import ZOOptimizer


class ZOSGD(ZOOptimizer):
    """Zeroth-order SGD without state. See `ZOOptimizer` for the arguments.

    Example:
        >>> opt = ZOSGD(model, lr=1e-6, eps=1e-3)
        >>> loss = opt.step(lambda: model(**batch).loss)
    """

    def _update(
        self, group: dict, chosen: list[int], seeds: list[int], gradients: list[float]
    ) -> None:
        passes.add_noise_(
            [group["params"][i] for i in chosen],
            seeds,
            step_coefficients(group, gradients),
            **self._pass_options(group, chosen),
        )


def step_coefficients(group: dict, gradients: list[float]) -> list[float]:
    """The factors −η dₖ/q on the directions, in binary64; +η where the loss is maximized."""
    step = float(group["lr"]) if group["maximize"] else -float(group["lr"])
    return [step * d / len(gradients) for d in gradients]
