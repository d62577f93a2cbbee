"""What the numbers say of a learning rate.

A step θ ← θ − η ĝ lowers the expected loss, to second order, by

    η ‖g‖² − η²/2 · E[ĝᵀHĝ]        E[ĝᵀHĝ] ≈ E[d²]·h/q + (1 − 1/q)·E[g_BᵀHg_B]

where g_B is the gradient of the step's batch. Assumed is that d² and zᵀHz vary apart (with normal z
and a gradient that is the same for all batches, this leaves out 2gᵀHg beside ‖g‖²·h). The last term
is neglected: it is that of exact gradients, has no q in it, and is small while q is well below the
number of directions that h is spread over; so with many queries the rates are upper bounds. Then

    largest rate   2q‖g‖²/(E[d²]·h): above it the loss rises
    best rate      half of it, which lowers the loss by q‖g‖⁴/(2·E[d²]·h)

E[d²] is that of the run's estimator. For a population of q it is q/(q − 1) times the variance of
L(θ+εz)/ε over directions on one batch, since what the members share cancels; that each d has a
share of the other members' noise adds terms of order 1/q² only.

Over n steps the second term adds up to n·η²·E[d²]·h/2q, while the first ends with what there is to
lower: where the loss cannot fall below 0, a rate at which that sum is the whole loss can gain
nothing, however steep the beginning is.

What divides every d by a number σ has σ times these rates: ``normalize="std"`` by the deviation of
a step's d, ``"ema"`` by √E[d²]. Momentum β has 1 − β times. `ZOSGDSign` with one query moves by
s = sign(d)·sign(z): E[sᵀHs] = h exactly, and d being near to normal E[g·s] = c‖g‖²/√E[d²] with
c = √(2/π) along signs and 2/π along normals. So its best rate is c‖g‖²/(√E[d²]·h).

Weight decay and ``clip`` are left out of account, and one rate for all param groups is assumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from zokernels.optim.base import ZOOptimizer
from zokernels.probing.drift import Drift
from zokernels.probing.numbers import Moments

RULES = "ZOSGD, ZOSGDMomentum, and ZOSGDSign with one query"
_SIGNS, _NORMALS = math.sqrt(2 / math.pi), 2 / math.pi


@dataclass(frozen=True)
class Rule:
    """What of an optimizer decides its rate.

    Attributes:
        name: The optimizer's class.
        num_queries: q.
        estimator: "two_sided", "one_sided" or "population".
        normalize: None, "std" or "ema".
        beta: Of momentum; 0 of other rules.
        dist: The directions.
        in_blocks: Whether it steps block by block.
    """

    name: str
    num_queries: int
    estimator: str
    normalize: str | None
    beta: float
    dist: str
    in_blocks: bool

    @classmethod
    def of(cls, opt: ZOOptimizer) -> Rule:
        """That of an optimizer."""
        group = opt.param_groups[0]
        name = type(opt).__name__
        return cls(
            name=name,
            num_queries=group["num_queries"],
            estimator=group["estimator"],
            normalize=group["normalize"],
            beta=float(group["beta"]) if name == "ZOSGDMomentum" else 0.0,
            dist=group["dist"],
            in_blocks=group["blocks"] is not None,
        )

    @property
    def why_not(self) -> str | None:
        """Why no rate follows from the numbers for this rule, as the beginning of a sentence."""
        signs = self.name == "ZOSGDSign"
        if self.name not in ("ZOSGD", "ZOSGDMomentum", "ZOSGDSign"):
            return f"{self.name}'s step does not follow from these numbers"
        if signs and self.num_queries > 1:
            return "the sign of a sum over several queries does not follow from these numbers"
        if self.in_blocks:
            return "with blocks each block has a step of its own"
        return None

    def mean_square(self, m: Moments) -> float:
        """E[d²] of the estimator."""
        if self.estimator == "population":
            return m.spread * self.num_queries / (self.num_queries - 1)
        return m.one_sided if self.estimator == "one_sided" else m.two_sided

    def best(self, m: Moments) -> float:
        """The rate that lowers the loss fastest; NaN where it has no value."""
        square, h = self.mean_square(m), m.curvature
        if square <= 0 or h == 0:
            return math.nan
        if self.name == "ZOSGDSign":
            return self._sign * m.squared_gradient / (math.sqrt(square) * h)
        plain = self.num_queries * m.squared_gradient / (square * h)
        return plain * (1 - self.beta) * self._divisor(m)

    def lasting(self, m: Moments, steps: int, drift: Drift) -> float:
        """The best rate of so many steps: by the curvature to which their noise leads.

        Where a loss cannot fall below 0, it is also one whose noise raises it by no more than there
        is to lower.
        """
        now, away = self.best(m), self._away(m, steps)
        if not (now > 0 and m.curvature > 0):
            return now
        there_is = m.loss if m.loss > 0 else math.inf
        low, high = 0.0, now
        for _ in range(60):
            middle = (low + high) / 2
            grown = 1 + drift.at(middle * away) / m.curvature
            is_less = middle * grown < now and steps * self._harm(m, middle) * grown < there_is
            low, high = (middle, high) if is_less else (low, middle)
        return high

    def _harm(self, m: Moments, lr: float) -> float:
        """How much the noise of a step at a rate raises the loss."""
        if self.name == "ZOSGDSign":
            return lr**2 * m.curvature / 2
        step = lr / ((1 - self.beta) * self._divisor(m))
        return step**2 * self.mean_square(m) * m.curvature / (2 * self.num_queries)

    def _away(self, m: Moments, steps: int) -> float:
        """How far a weight is from where it began after so many steps, over their rate."""
        if self.name == "ZOSGDSign":
            return math.sqrt(steps)
        noise = math.sqrt(steps * self.mean_square(m) / self.num_queries)
        return noise / ((1 - self.beta) * self._divisor(m))

    def fall(self, m: Moments, lr: float) -> float:
        """How much a step at a rate lowers the loss; NaN where that has no value."""
        square = self.mean_square(m)
        if square <= 0:
            return math.nan
        if self.name == "ZOSGDSign":
            gain = lr * self._sign * m.squared_gradient / math.sqrt(square)
        else:
            gain = lr * m.squared_gradient / ((1 - self.beta) * self._divisor(m))
        return gain - self._harm(m, lr)

    @property
    def _sign(self) -> float:
        return _NORMALS if self.dist == "gaussian" else _SIGNS

    def _divisor(self, m: Moments) -> float:
        """What each d of a step is divided by."""
        if self.normalize == "ema":
            return math.sqrt(self.mean_square(m))
        if self.normalize == "std":
            q = self.num_queries
            # The base loss that one-sided differences share is not in their deviation.
            square = {
                "two_sided": m.two_sided,
                "one_sided": m.spread,
                "population": m.spread * (q / (q - 1)) ** 2,
            }
            return math.sqrt(square[self.estimator])
        return 1.0
