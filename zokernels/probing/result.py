"""What a probe found: numbers with their errors, and the rates that follow, or why none does."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from zokernels.probing.advice import RULES, Rule
from zokernels.probing.drift import Drift
from zokernels.probing.ladder import TOLERANCE, Rung
from zokernels.probing.numbers import Moments, Number, brief, number

# Beyond so many times the forwards that were run, how many would tell is not worth a number.
_TOO_MANY = 50
# Of the best rate: what is advised.
SHARE = 0.7


@dataclass(frozen=True)
class Part:
    """The numbers of some of the weights, by directions along them alone.

    Those of parts that make up the whole add up to those of the whole.

    Attributes:
        label: Its name; "all" of the whole.
        weights: How many weights it has.
        squared_gradient: ‖g‖², the squared norm of the expected loss's gradient; unbiased, so that
            it may come out below 0.
        mean_square: E[d²] of the central difference along unit-variance directions, of one batch.
        curvature: h, the trace of the Hessian along the noise.
        fall: By how much one step of plain ZO-SGD with one pair lowers the loss at the best rate if
            these weights alone move, ‖g‖⁴/(2·E[d²]·h), or 0 where ‖g‖² came out below; None where h
            does not stand out of its error.
    """

    label: str
    weights: int
    squared_gradient: Number
    mean_square: Number
    curvature: Number
    fall: Number | None

    @classmethod
    def of(cls, label: str, weights: int, rounds: tuple[Moments, ...]) -> Part:
        """The part that some rounds are about."""
        pairs = Rule("ZOSGD", 1, "two_sided", None, 0.0, "gaussian", False)
        curvature = number(rounds, lambda m: m.curvature)
        fall = number(rounds, lambda m: pairs.fall(m, max(0.0, pairs.best(m))))
        return cls(
            label,
            weights,
            number(rounds, lambda m: m.squared_gradient),
            number(rounds, lambda m: m.two_sided),
            curvature,
            fall if curvature.stands_out else None,
        )


@dataclass(frozen=True)
class Probe:
    """What `probe` found; printed, it is its verdict.

    Losses are in the loss's own unit, negated where the optimizer maximizes; with weights that have
    none ‖g‖² and E[d²] are in its square, and h is in itself. Rates are the optimizer's ``lr``.
    ``docs/tune.md`` has the formulas, and what they assume.

    Attributes:
        tolerance: By which share of itself a slope may differ from a neighbour's, to agree.
        eps: The optimizer's ε, at which all was measured.
        forwards: How many forwards it took, one a point.
        loss: The loss at the weights as they are.
        whole: The numbers of all trained weights.
        parts: Those of each group of parameters, if groups were asked for.
        mean_square: E[d²] of the optimizer's own estimator, which for the central difference is
            that of ``whole``.
        ladder: The ε that were tried, and how well neighbours agree.
        eps_range: The least and the largest ε of the longest run of rungs whose neighbours agree to
            a tenth; None if none do.
        largest_rate: The rate above which a step raises the loss on average; None if no rate
            follows for this optimizer, ε is out of range, h does not stand out of its error, or
            ‖g‖² came out below 0.
        best_rate: The rate at which a step lowers it most, now: half of the largest.
        steps: Of the run that is advised.
        rate: The rate to take: seven tenths of the one that is best by the curvature where the
            run's own noise carries the weights, which gives nine tenths of what that gives, or, if
            that is less, of the one at which the noise of all steps raises a loss above 0 by as
            much as it is. None if it can't be told; see ``why``.
        why: Why no rate is advised, a sentence; None if one is.
        more_forwards: How many more would tell, if the numbers are what they seem; None if that is
            not what is missing, or too many.
        rule: What of the optimizer decides its rates.
        rounds: What each round of forwards gave.
        drift: How the curvature grows with the distance from the weights.
    """

    tolerance: ClassVar[float] = TOLERANCE

    eps: float
    forwards: int
    loss: Number
    whole: Part
    parts: tuple[Part, ...]
    mean_square: Number
    ladder: tuple[Rung, ...]
    eps_range: tuple[float, float] | None
    largest_rate: Number | None
    best_rate: Number | None
    steps: int
    rate: Number | None
    why: str | None
    more_forwards: int | None
    rule: Rule = field(repr=False)
    rounds: tuple[Moments, ...] = field(repr=False)
    drift: Drift = field(repr=False)

    def fall(self, steps: int = 1, lr: float | None = None) -> Number:
        """By how much steps lower the loss, if the numbers stay what they are.

        They do not for long: ‖g‖² falls with the loss. So this is a bound for the first steps, and
        not what a run reaches.

        Args:
            steps: How many.
            lr: Their rate; None takes ``rate``.

        Raises:
            ValueError: If no rate is given and none was advised, or nothing follows for the rule.
        """
        if lr is not None:
            at = lr
        elif self.rate is not None:
            at = self.rate.value
        else:
            raise ValueError(f"No rate was advised ({self.why}), so give one: probe.fall(100, lr).")
        if self.rule.why_not is not None:
            raise ValueError(f"There is no fall to tell of: {self.rule.why_not}.")
        return number(self.rounds, lambda m: self.rule.fall(m, at)).times(steps)

    def __str__(self) -> str:
        if self.rate is None or self.best_rate is None or self.largest_rate is None:
            return f"No rate is advised: {self.why}"
        return (
            f"Take lr {self.rate.value:.2g} for {self.steps:,} steps. Now a step lowers the loss "
            f"most at {self.best_rate}, and above {self.largest_rate.value:.2g} it rises; over a "
            f"run their noise adds up, so that less is best. A step lowers the loss, "
            f"{brief(self.loss.value)} now, by {self.fall()}."
        )

    def plain(self) -> dict[str, Any]:
        """All numbers as JSON can hold them; None in place of what is not finite."""
        return {
            "eps": self.eps,
            "eps_range": list(self.eps_range) if self.eps_range else None,
            "ladder": [{"eps": r.eps, "deviation": _finite(r.deviation)} for r in self.ladder],
            "forwards": self.forwards,
            "loss": _plain(self.loss),
            "mean_square": _plain(self.mean_square),
            "largest_rate": _plain(self.largest_rate),
            "best_rate": _plain(self.best_rate),
            "steps": self.steps,
            "rate": _plain(self.rate),
            "drift": {
                "distances": list(self.drift.distances),
                "growth": [_finite(x) for x in self.drift.growth],
            },
            "why": self.why,
            "more_forwards": self.more_forwards,
            "fall": _plain(self.fall()) if self.rate else None,
            "rule": vars(self.rule),
            "whole": _part(self.whole),
            "parts": [_part(part) for part in self.parts],
        }


def conclude(
    rule: Rule,
    eps: float,
    forwards: int,
    rounds: tuple[Moments, ...],
    whole: Part,
    parts: tuple[Part, ...],
    ladder: tuple[tuple[Rung, ...], tuple[float, float] | None],
    drift: Drift,
    steps: int,
) -> Probe:
    """The result of what was measured."""
    rungs, good = ladder
    found = lasting = None
    holds = good is not None and good[0] <= eps <= good[1]
    follows = holds and rule.why_not is None and whole.curvature.stands_out
    if follows and whole.squared_gradient.value > 0:
        found = number(rounds, rule.best)
        lasting = number(rounds, lambda m: rule.lasting(m, steps, drift))
    why, more = _why(rule, eps, good, rungs, whole), None
    if why is None:
        why, more = _hidden(whole, forwards)
    return Probe(
        eps=eps,
        forwards=forwards,
        loss=number(rounds, lambda m: m.loss),
        whole=whole,
        parts=parts,
        mean_square=number(rounds, rule.mean_square),
        ladder=rungs,
        eps_range=good,
        largest_rate=found.times(2) if found else None,
        best_rate=found,
        steps=steps,
        rate=lasting.times(SHARE) if lasting and why is None else None,
        why=why,
        more_forwards=more,
        rule=rule,
        rounds=rounds,
        drift=drift,
    )


def _why(
    rule: Rule,
    eps: float,
    good: tuple[float, float] | None,
    rungs: tuple[Rung, ...],
    whole: Part,
) -> str | None:
    """What is missing that no further forward brings."""
    if rule.why_not is not None:
        return f"{rule.why_not}; rates are advised for {RULES}."
    if whole.mean_square.value == 0:
        return (
            f"no loss changed at eps {eps:g}, so there is nothing to follow; take a larger one, or "
            "a loss that small changes of the weights move."
        )
    if good is None:
        closest = min(rungs, key=lambda rung: rung.deviation)
        return (
            f"no ε from {rungs[0].eps:.1g} to {rungs[-1].eps:.1g} gives differences that a "
            f"neighbour confirms to {TOLERANCE:.0%}, and {closest.eps:.1g} comes closest with "
            f"{closest.deviation:.0%}; try float32, larger batches, or an eps far from {eps:g}."
        )
    low, high = good
    if not low <= eps <= high:
        return (
            f"eps {eps:g} is not in the range {low:.1g} to {high:.1g} in which differences hold; "
            f"take eps {math.sqrt(low * high):.1g} and probe again."
        )
    if whole.curvature.value < 0 and whole.curvature.interval[1] < 0:
        return (
            f"h = {whole.curvature} is negative, so that to second order nothing bounds the rate; "
            "train some steps at a small one, and probe again."
        )
    return None


def _hidden(whole: Part, forwards: int) -> tuple[str | None, int | None]:
    """Which number its error hides, and how many more forwards would show it."""
    for name, found in (("h", whole.curvature), ("‖g‖²", whole.squared_gradient)):
        if found.stands_out:
            continue
        more = _more(found, forwards)
        much = "many more forwards might tell"
        if more is not None:
            much = f"if it is what it seems, some {more:,} more forwards would tell"
        why = (
            f"{name} = {found} does not stand out of its error; {much}, or larger batches, or "
            "fewer trained weights."
        )
        return why, more
    return None, None


def _more(hidden: Number, forwards: int) -> int | None:
    """Errors fall with the root of the forwards."""
    if hidden.value <= 0:
        return None
    factor = (hidden.reach / hidden.value) ** 2 - 1
    return max(1, round(factor * forwards / 100)) * 100 if factor <= _TOO_MANY else None


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _plain(n: Number | None) -> dict[str, Any] | None:
    if n is None:
        return None
    return {"value": _finite(n.value), "error": _finite(n.error), "directions": n.directions}


def _part(part: Part) -> dict[str, Any]:
    numbers = ("squared_gradient", "mean_square", "curvature", "fall")
    plain = {name: _plain(getattr(part, name)) for name in numbers}
    return {"label": part.label, "weights": part.weights, **plain}
