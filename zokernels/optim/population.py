"""The members of a step's population: one at a time, or all in the rows of one batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from zokernels.estimators import Point
from zokernels.optim.forward import same_randomness
from zokernels.perturb import (
    Direction,
    InPlace,
    Move,
    OnEntry,
    RandomState,
    Rows,
    is_plain_list,
    together,
)


class Member:
    """A point of a step: inside its block the model's forwards see its weights.

    ``with member:`` forwards run without gradients and without dropout, and draw the random numbers
    that every other member's draw. After it the weights are what they were, also by an exception.

    Attributes:
        index: Its number among those of this process, which is its place in what `tell` takes.
        seed: Of its direction; 0 where it has none.
        side: 1 or −1; or 0 for the weights as they are, which one-sided differences are from.
    """

    def __init__(self, population: Population, index: int, point: Point):
        self._population = population
        self.index, (self.seed, self.side) = index, point
        self._perturber: InPlace | OnEntry | None = None
        self._open: contextlib.ExitStack | None = None

    def __enter__(self) -> Member:
        population = self._population
        with contextlib.ExitStack() as stack:
            population._begin(stack)
            lane = population._lanes([(self.seed, self.side)])[0]
            if lane is not None:
                perturbers = population._optimizer._perturbers
                self._perturber = perturbers.of(population._params)
                stack.enter_context(self._perturber.at(lane))
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        stack, self._open = self._open, None
        assert stack is not None
        stack.__exit__(kind, *error)
        if kind is None and isinstance(self._perturber, OnEntry):
            self._perturber.check_perturbed()


class Population:
    """The points of one step that this process looks at: what `ZOOptimizer.ask` gives.

    It is a sequence of `Member`, each to be entered by itself; or, entered as a whole, the model's
    forwards take all of them at once, in the rows of a batch that repeats its own for each.

    Example:
        >>> with opt.ask() as population:
        ...     ids = model.generate(**population.repeat(prompts), max_new_tokens=20)
        >>> opt.tell([reward(text) for text in map(decode, population.split(ids))])
    """

    def __init__(self, optimizer: Any, points: Sequence[Point]):
        self._optimizer = optimizer
        self._params = [g["params"][i] for g, chosen in optimizer._chosen(None) for i in chosen]
        self.members = [Member(self, k, point) for k, point in enumerate(points)]
        self._random = RandomState(p.device for p in self._params)
        self._asked = self._settings()
        self._rows: Rows | None = None
        self._open: contextlib.ExitStack | None = None

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)

    def __getitem__(self, index: int) -> Member:
        return self.members[index]

    def __enter__(self) -> Population:
        opt = self._optimizer
        if opt.model is None or opt.perturb == "in_place":
            raise ValueError(
                "All members at once need a model that is perturbed on entry, and this one is "
                "perturbed in place; take them one at a time: for member in opt.ask(): "
                "with member: ..."
            )
        rows = Rows(len(self))
        with contextlib.ExitStack() as stack:
            self._begin(stack)
            perturber = opt._perturbers.of(self._params, lazy_logits=False)
            lanes = self._lanes([(m.seed, m.side) for m in self.members])
            stack.enter_context(together(perturber, lanes, rows))
            self._open = stack.pop_all()
        self._rows = rows
        return self

    def __exit__(self, *error: Any) -> None:
        stack, self._open = self._open, None
        assert stack is not None
        stack.__exit__(*error)

    def repeat(self, batch: Any) -> Any:
        """The batch for all members: every tensor's rows, once for each member.

        Args:
            batch: Tensors with one row an example, and lists of as many texts or numbers, in dicts,
                lists and tuples; what a tokenizer gives.

        Returns:
            The same with ``len(population)`` times as many rows, member by member. Of these, and of
            what is made of them row by row, the model knows whose they are.

        Raises:
            RuntimeError: Outside of ``with opt.ask() as population``.
        """
        if self._open is None or self._rows is None:
            raise RuntimeError(
                "repeat() was called outside of its block, in which alone a model knows whose rows "
                "they are: with opt.ask() as population: ..."
            )
        return self._rows.repeat(batch)

    def split(self, outputs: Any) -> list[Any]:
        """What belongs to each member.

        Args:
            outputs: Tensors with the rows of all members, lists of as many texts or numbers, or one
                number a member; in dicts, lists, tuples and outputs of transformers.

        Returns:
            One such a member.

        Raises:
            ValueError: If the rows can't be shared out, or are not those of one member after the
                other.
        """
        leaves, kind = tree_flatten(outputs, is_leaf=is_plain_list)
        parts = [self._parts(leaf) for leaf in leaves]
        return [tree_unflatten([own[k] for own in parts], kind) for k in range(len(self))]

    def _parts(self, t: Any) -> list[Any]:
        count = len(self)
        if not isinstance(t, list) and (not isinstance(t, torch.Tensor) or not t.dim()):
            return [t] * count
        if len(t) % count:
            raise ValueError(
                f"split() got a {type(t).__name__.lower()} of {len(t)} rows for {count} members; "
                "give what was made of population.repeat(batch)."
            )
        if self._rows is not None and self._rows.is_out_of_order(t):
            raise ValueError(
                "split() got rows that were put in another order than population.repeat(batch) "
                "has them in, member by member; split first, and order what each member has."
            )
        size = len(t) // count
        return [t[k * size : (k + 1) * size] for k in range(count)]

    def _settings(self) -> dict[str, Any]:
        """What decides about the points, as it is now."""
        groups = self._optimizer.param_groups
        names = ("seed", "step", "num_queries", "estimator", "dist")
        return {name: groups[0][name] for name in names} | {"eps": [g["eps"] for g in groups]}

    def check_asked(self) -> None:
        """Raise RuntimeError where another step would be made of what these members say."""
        now = self._settings()
        if changed := [name for name, was in self._asked.items() if was != now[name]]:
            first = changed[0]
            raise RuntimeError(
                f"{first} is {now[first]} and was {self._asked[first]} when these members were "
                "asked for, so that their losses are of another step: change settings, and load a "
                "state, before opt.ask() or after opt.tell(). Ask again."
            )

    def _lanes(self, points: Sequence[Point]) -> list[Direction | None]:
        opt = self._optimizer
        groups = opt._chosen(None)
        scales = [float(g["eps"]) for g, chosen in groups for _ in chosen]
        directions = opt._directions(groups)
        return [
            directions([Move((side * eps,)) for eps in scales], [seed]) if side else None
            for seed, side in points
        ]

    def _begin(self, stack: contextlib.ExitStack) -> None:
        """What every forward of a step has around it."""
        opt = self._optimizer
        if opt._population is not self:
            raise RuntimeError(
                "These members are of a step that was told or asked for again; take those of "
                "opt.ask()."
            )
        self.check_asked()
        opt._refuse_inside()
        stack.enter_context(torch.no_grad())
        stack.enter_context(opt._perturbers.forwards())
        buffers = stack.enter_context(opt._buffers.kept())
        stack.enter_context(buffers.looking())
        stack.enter_context(same_randomness(opt.model, self._params))
        torch.clear_autocast_cache()
        self._random.restore()
        buffers.put_back()
