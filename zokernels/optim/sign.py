"""ZO-SGD-Sign: θ ← (1 − η·wd)·θ − η sign(ĝ), element by element, ĝ = (1/q) Σ dₖ zₖ.

The sign is that of the whole sum over the queries. sign(d)·z, which has a normal's length in every
element, is another rule. Source: signSGD (Bernstein et al., ICML 2018); ZO-signSGD (Liu et al.,
ICLR 2019).
"""

from __future__ import annotations

from zokernels import passes
from zokernels.optim.base import ZOOptimizer
from zokernels.optim.groups import mean_coefficients


class ZOSGDSign(ZOOptimizer):
    """Zeroth-order sign SGD: every weight moves by the learning rate. No state.

    See `ZOOptimizer` for the arguments.
    """

    def _update(
        self, group: dict, chosen: list[int], seeds: list[int], gradients: list[float]
    ) -> None:
        passes.apply_update_(
            [group["params"][i] for i in chosen],
            None,
            "sign",
            seeds,
            mean_coefficients(group, gradients),
            lr=float(group["lr"]),
            **self._pass_options(group, chosen),
        )
