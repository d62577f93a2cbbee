"""ZO-SGD-Cons: of θ, θ − η ĝ and θ + η ĝ, keep the one with the lowest loss on the same batch.

The candidates are judged by perturbed forwards, and the weights are written only where one of the
two moves wins. With weight decay both are (1 − η·wd)·θ ∓ η ĝ: the decay belongs to the step, so a
step that is not taken decays nothing.

Source: the benchmark of Zhang et al., ICML 2024; the stochastic three points method of Bergou,
Gorbunov and Richtarik, SIAM J. Optim. 2020.
"""

from __future__ import annotations

import math

from zokernels.estimators import Estimate
from zokernels.optim.base import LossOf
from zokernels.optim.groups import Chosen
from zokernels.optim.sgd import ZOSGD, step_coefficients
from zokernels.perturb import Move


class ZOSGDConservative(ZOSGD):
    """Zeroth-order SGD that takes no step that its own batch dislikes. No state.

    Three forwards more than `ZOSGD`, or two where the estimate is one-sided: its base loss is that
    of θ. A candidate is judged rounded as it would be written, and on a tie θ stays.

    See `ZOOptimizer` for the arguments. ``maximize`` keeps the highest loss.

    Attributes:
        side: What the last step kept: 1 for θ − η ĝ, −1 for θ + η ĝ, 0 for θ.
    """

    side = 0
    accumulates = False

    def _check_rule(self, group: dict) -> None:
        if group["maximize"] != self.param_groups[0]["maximize"]:
            raise ValueError(
                f"maximize is {group['maximize']} in one param group and not in another, but the "
                "candidates move all groups together; give all groups the same."
            )

    def _judge(self, found: Estimate, loss_of: LossOf, groups: Chosen) -> None:
        first = self.param_groups[0]
        based = first["estimator"] == "one_sided"
        best = found.losses[0] if based else loss_of(None, [], 0)
        self.side = found.side = 0
        if not math.isfinite(best):
            found.losses.append(best)
            return
        if None in found.gradients:
            return
        for side in (1, -1):
            moves = [
                move
                for (group, chosen), gradients in zip(groups, found.gradients, strict=True)
                for move in [_move(group, gradients or [], side)] * len(chosen)
            ]
            loss = loss_of(moves, found.seeds, self._rounding_seed())
            better = loss > best if first["maximize"] else loss < best
            if math.isfinite(loss) and better:
                self.side, best = side, loss
        found.side = self.side


def _move(group: dict, gradients: list[float], side: int) -> Move:
    """What the update of a group does to each of its parameters."""
    decay = 1.0 - float(group["lr"]) * group["weight_decay"]
    coefficients = step_coefficients(group, [side * d for d in gradients])
    return Move(tuple(coefficients), decay, group["rounding"], True)
