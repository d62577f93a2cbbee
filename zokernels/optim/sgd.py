"""ZO-SGD: θ ← (1 − η·wd)·θ − η ĝ, ĝ = (1/q) Σ dₖ zₖ, in one pass over the weights.

Source: MeZO (Malladi et al., NeurIPS 2023, Algorithm 1); ZO-SGD of Ghadimi and Lan, SIAM J. Optim.
2013.
"""

from __future__ import annotations

from zokernels import masks, ops
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
        lr = float(group["lr"])
        step = lr if group["maximize"] else -lr
        ops.add_noise_(
            [group["params"][i] for i in chosen],
            seeds,
            [step * d / len(seeds) for d in gradients],
            streams=[group["streams"][i] for i in chosen],
            dist=group["dist"],
            mask=masks.take(masks.from_plain(group["mask"]), chosen),
            decay=1.0 - lr * group["weight_decay"],
            rounding=group["rounding"],
            rounding_seed=self._rounding_seed(),
            backend=self.backend,
        )
