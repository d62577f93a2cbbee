"""The probe itself: rounds of forwards around the weights, and a ladder of ε."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from zokernels.backends.tracer import untraced
from zokernels.estimators import PROBE, derive_seed
from zokernels.optim.base import ZOOptimizer
from zokernels.optim.groups import Chosen
from zokernels.probing import ladder, numbers
from zokernels.probing.advice import Rule
from zokernels.probing.drift import Drift
from zokernels.probing.labels import Groups, label
from zokernels.probing.numbers import Moments
from zokernels.probing.result import Part, Probe, conclude
from zokernels.probing.site import Site

# Rounds, of the whole and of each part: with fewer an error is itself hardly known.
_LEAST = 4
# Forwards of a round of the whole, and of a part; and of the ladder.
_ROUND = numbers.FORWARDS * numbers.BATCHES
_ROUND_OF_PART = numbers.FORWARDS * numbers.BATCHES_OF_PART
_LADDER = ladder.ROUNDS * numbers.DIRECTIONS * 2 * (len(ladder.FACTORS) - 1)

Progress = Callable[[int, int], None]


@untraced
@torch.no_grad()
def probe(
    opt: ZOOptimizer,
    loss_fn: Callable[[Any], torch.Tensor | float],
    batches: Iterable[Any],
    *,
    directions: int = 32,
    forwards: int | None = None,
    groups: Groups = None,
    steps: int = 1000,
    seed: int | None = None,
    progress: Progress | None = None,
) -> Probe:
    """Measure, by forwards alone, what decides the learning rate and ε of an optimizer.

    Nothing changes by it: weights, the optimizer and its step, buffers, and where torch's, Python's
    and NumPy's generators stand are what they were, also after an exception. Dropout is off. Its
    directions are none that a step takes.

    Example:
        >>> opt = ZOSGD(model, lr=0.0, eps=1e-3)
        >>> found = probe(opt, lambda batch: model(**batch).loss, loader)
        >>> print(found)

    Args:
        opt: The optimizer as it will run: its ε, directions, mask, number of queries, way of
            perturbing and whether it maximizes count, its ``lr`` does not.
        loss_fn: Runs a forward on a batch and returns the loss, a scalar.
        batches: Batches of the size that the steps will have, each drawn apart from the others;
            four a direction are taken.
        directions: Along all trained weights, an even number of at least 8. Each costs 20 forwards,
            and the ladder of ε 64.
        forwards: Instead of ``directions``: how many forwards there may be. With ``groups`` half of
            them are for the groups.
        groups: Also measure parts of the weights, each along directions of its own: ``"group"``
            (embeddings, attention, mlp, norms, biases, head, other), ``"layer"`` (embeddings, each
            layer, head), or a function from a parameter's name to its group's label. Each gets at
            least 8 directions of two batches, 10 forwards each; together about as many directions
            as the whole has.
        steps: How many the run will have: what its noise does to the weights grows with their
            number, and so the rate to take falls.
        seed: Of the probe's directions; None takes the optimizer's.
        progress: Called after each batch with the forwards so far and in all.

    Returns:
        The numbers with their errors, and the rates that follow from them.

    Raises:
        ValueError: If an argument is out of range, there are too few batches, the param groups
            differ in ``eps`` or ``maximize``, several processes share the work, or the optimizer
            has no ε.
        FloatingPointError: If a loss at θ or θ ± εz is not finite.
        RuntimeError: If it is called inside of a step's closure.
    """
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps is {steps!r}, but a run has a whole number of them, from 1 on.")
    if progress is None:
        progress = _silent
    group = opt.param_groups[0]
    _check(opt)
    labels = {} if groups is None else label(opt.model, groups)
    total = 0

    def told(done: int) -> None:
        progress(done, total)

    site = Site(opt, loss_fn, told)
    with site.standing():
        names = _names(site, labels)
        count, of_each = _rounds(directions, forwards, len(names))
        total = _LADDER + _ROUND * count + _ROUND_OF_PART * of_each * len(names)
        run = _Run(site, iter(batches), group["seed"] if seed is None else seed)
        rounds = run.rounds(site.groups, count, 0)
        weights = {"all": _size(site.groups)}
        parts = []
        for place, name in enumerate(names, 1):
            chosen = site.part({i for i, own in labels.items() if own == name})
            weights[name] = _size(chosen)
            parts.append(Part.of(name, weights[name], run.rounds(chosen, of_each, place)))
        whole = Part.of("all", weights["all"], rounds)
    eps = float(group["eps"])
    return conclude(
        Rule.of(opt),
        eps,
        site.forwards,
        rounds,
        whole,
        tuple(parts),
        ladder.judge(eps, run.slopes),
        Drift.of(eps, run.rises),
        steps,
    )


class _Run:
    """Rounds at a site.

    Attributes:
        slopes: The d of some directions at each rung of the ladder.
        rises: By how much the mean of L± is above L there.
    """

    def __init__(self, site: Site, batches: Iterator[Any], seed: int):
        self.site, self.batches, self.seed = site, batches, seed
        self.drawn = 0
        self.slopes: list[list[float]] = []
        self.rises: list[list[float]] = []
        first = site.opt.param_groups[0]
        self.eps = float(first["eps"])
        self.sign = -1.0 if first["maximize"] else 1.0

    def rounds(self, groups: Chosen, count: int, place: int) -> tuple[Moments, ...]:
        """So many rounds along these parameters, which are number ``place`` of the probe's."""
        perturber = self.site.perturber(groups)
        found = []
        for number in range(count):
            batches = self._draw(numbers.BATCHES_OF_PART if place else numbers.BATCHES)
            seeds = [
                derive_seed(self.seed, number, k, PROBE, place) for k in range(numbers.DIRECTIONS)
            ]
            with self.site.round(groups, perturber) as losses_at:
                at = [self._losses(losses_at, batch, seeds) for batch in batches]
                if place == 0 and number < ladder.ROUNDS:
                    self._climb(losses_at, batches[0], seeds, at[0])
            # By direction and batch.
            plus, minus = ([[a[2 * k + s] for a in at] for k in range(len(seeds))] for s in (0, 1))
            found.append(numbers.moments(plus, minus, [a[-1] for a in at], self.eps))
        perturber.release()
        return tuple(found)

    def _draw(self, count: int) -> list[Any]:
        batches = list(islice(self.batches, count))
        self.drawn += len(batches)
        if len(batches) < count:
            raise ValueError(
                f"batches ended after {self.drawn}, but a probe takes four for each direction, and "
                "two along a group; give an iterable with more, such as itertools.cycle of a "
                "loader, or probe along fewer directions."
            )
        return batches

    def _losses(self, losses_at: Any, batch: Any, seeds: list[int]) -> list[float]:
        """Both sides of each direction, and the base loss."""
        points = [(seed, side * self.eps) for seed in seeds for side in (1, -1)]
        found = [self.sign * x for x in losses_at(batch, [*points, (0, 0.0)])]
        if not all(map(math.isfinite, found)):
            raise FloatingPointError(
                f"A loss was not finite at eps {self.eps:g} (L± of each direction and L: "
                f"{[self.sign * x for x in found]}), so there is nothing to measure; lower eps, or "
                "look at the data."
            )
        return found

    def _climb(self, losses_at: Any, batch: Any, seeds: list[int], known: list[float]) -> None:
        """The slopes and rises of these directions at every rung."""
        for k, seed in enumerate(seeds):
            slopes, rises = [], []
            for place, factor in enumerate(ladder.FACTORS):
                eps = self.eps * factor
                if place == ladder.MIDDLE:
                    plus, minus = known[2 * k], known[2 * k + 1]
                else:
                    found = losses_at(batch, [(seed, eps), (seed, -eps)])
                    plus, minus = (self.sign * x for x in found)
                slopes.append((plus - minus) / (2 * eps))
                rises.append((plus + minus) / 2 - known[-1])
            self.slopes.append(slopes)
            self.rises.append(rises)


def _silent(done: int, total: int) -> None:
    """Tells nobody."""


def _check(opt: ZOOptimizer) -> None:
    if not isinstance(opt, ZOOptimizer):
        raise ValueError(
            f"opt is a {type(opt).__name__}, but a probe is of an optimizer of zokernels; make "
            "one: zk.ZOSGD(model)."
        )
    if type(opt).__name__ == "ForwardGrad":
        raise ValueError(
            "ForwardGrad takes derivatives and has no ε to probe along; probe "
            "zk.ZOSGD(model, eps=1e-3), whose rates are ForwardGrad's too."
        )
    if opt.parallel.ranks > 1:
        raise ValueError(
            f"There are {opt.parallel.ranks} processes, but a probe runs in one; probe in one "
            "process, with batches of the size that all of them have together."
        )
    for name in ("eps", "maximize"):
        if len({float(g[name]) for g in opt.param_groups}) > 1:
            raise ValueError(
                f"The param groups have {name} {', '.join(str(g[name]) for g in opt.param_groups)},"
                " but a probe is along directions of one scale; give all groups the same."
            )


def _names(site: Site, labels: dict[int, str]) -> list[str]:
    """The labels of what is trained, in the order of the parameters; none without labels."""
    if not labels:
        return []
    found = [labels[id(g["params"][i])] for g, chosen in site.groups for i in chosen]
    return list(dict.fromkeys(found))


def _rounds(directions: int, forwards: int | None, parts: int) -> tuple[int, int]:
    """How many rounds the whole gets, and each part."""
    if forwards is None:
        if directions % numbers.DIRECTIONS or directions < _LEAST * numbers.DIRECTIONS:
            raise ValueError(
                f"directions is {directions}, but it must be an even number of at least "
                f"{_LEAST * numbers.DIRECTIONS}."
            )
        count = directions // numbers.DIRECTIONS
        return count, max(_LEAST, count // parts) if parts else 0
    least = _LADDER + _LEAST * (_ROUND + _ROUND_OF_PART * parts)
    if forwards < least:
        what = f" and {parts} groups" if parts else ""
        raise ValueError(
            f"forwards is {forwards}, but the least that tells anything of all weights{what} is "
            f"{least}; give that many or more."
        )
    left = forwards - _LADDER
    of_each = max(_LEAST, left // 2 // _ROUND_OF_PART // parts) if parts else 0
    return (left - of_each * parts * _ROUND_OF_PART) // _ROUND, of_each


def _size(groups: Chosen) -> int:
    return sum(g["params"][i].numel() for g, chosen in groups for i in chosen)
