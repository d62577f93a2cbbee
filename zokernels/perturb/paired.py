"""Several points in one forward of the model, each with its own weights.

Layer by layer, each weight is read once and each direction drawn once, for θ + εz and θ − εz alike;
what no perturbed weight has met is computed once for all points (`zokernels.perturb.points`). The
closure is still called once a point: the model's forward runs in the first call, and the others get
their part of its outputs from memory.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from zokernels.perturb.filling import Lane
from zokernels.perturb.logits import PerturbedLogits
from zokernels.perturb.on_entry import OnEntry
from zokernels.perturb.points import Points, is_about_points
from zokernels.perturb.weight import Entry, Misused, Unshareable


class Paired(OnEntry):
    """Perturbs as `OnEntry` does, and runs several points as one forward where the model allows.

    A closure that can't be shared, and a model that does what batching rules can't follow (it reads
    perturbed values on the host, or calls an extension), go on one forward a point, with one
    message.

    Attributes:
        off: Why every point has its own forward, or None.
    """

    off: str | None = None

    def run_all(
        self, lanes: Sequence[Lane], forward: Callable[[], torch.Tensor | float]
    ) -> list[float]:
        """``forward()`` at every point: what `run` gives for each."""
        if self.off is not None or len(lanes) == 1:
            return [self._run_alone(lane, forward) for lane in lanes]
        done = []
        if not self._is_settled:
            # A forward of its own tells which parameters no operation asks for.
            done = [self._run_alone(lanes[0], forward)]
        try:
            for holder in self._hooks.holders:
                kind = type(holder).__name__
                raise Unshareable(f"{kind} takes its weights where nobody can watch")
            return [float(loss) for loss in self.run_shared(lanes, forward)]
        except RuntimeError as error:
            if not (isinstance(error, Unshareable) or is_about_points(error)):
                raise
            why = str(error)
        found = done + [self._run_alone(lane, forward) for lane in lanes[len(done) :]]
        # What a forward of its own raises as well has been raised by now.
        self._give_up(why)
        return found

    def _run_alone(self, lane: Lane, forward: Callable[[], torch.Tensor | float]) -> float:
        return float(forward()) if lane is None else self.run(lane, lambda: float(forward()))

    def run_shared(
        self, lanes: Sequence[Lane], forward: Callable[[], torch.Tensor | float]
    ) -> list[torch.Tensor | float]:
        """What ``forward()`` returns at every point, in one forward of the model.

        Raises:
            Unshareable: If the points can't share one.
        """
        found = []
        with self.standing(lanes) as entry, self._shared_forward(entry) as shared:
            for lane in range(len(lanes)):
                shared.closure_of(lane)
                found.append(forward())
        return found

    @contextlib.contextmanager
    def _shared_forward(self, entry: Entry) -> Iterator[_SharedForward]:
        """The model's own forward replaced by one that all lanes share, inside the block."""
        before = vars(self.model).get("forward")
        shared = _SharedForward(self.model.forward, entry)
        vars(self.model)["forward"] = shared
        try:
            yield shared
        finally:
            shared.forget()
            if before is None:
                vars(self.model).pop("forward", None)
            else:
                vars(self.model)["forward"] = before

    def _give_up(self, why: str) -> None:
        self.off = why.strip().partition("\n")[0].rstrip(".")
        warnings.warn(
            f"perturb='paired' goes on as 'on_entry', one forward a point: {self.off}.",
            stacklevel=6,
        )


class _SharedForward:
    """A model's forward at all points, run for the first lane and remembered for the rest.

    Args:
        forward: The model's.
        entry: The perturbed weights.
    """

    def __init__(self, forward: Callable[..., Any], entry: Entry):
        self.forward = forward
        self.entry = entry
        # Callers look at the arguments that a forward has.
        functools.update_wrapper(self, forward)
        self._call = 0
        self._known: list[tuple[Any, list[Any]]] = []

    def closure_of(self, lane: int) -> None:
        """The closure of this lane begins."""
        self._call = 0
        self.entry.closure_of(lane)

    def forget(self) -> None:
        """Let go of the outputs: logits that only wait here need not be computed."""
        self._known.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the current lane."""
        entry = self.entry
        if entry.points is not None:
            return self.forward(*args, **kwargs)
        given = (args, kwargs)
        call = self._call
        self._call += 1
        if entry.lane == 0:
            self._known.append((given, self._run(args, kwargs)))
        if call >= len(self._known) or not _equal(self._known[call][0], given):
            raise Unshareable("the closure's forwards do not see the same batch each time")
        return self._known[call][1][entry.lane]

    def _run(self, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
        """The model's outputs, for each lane."""
        if any(hasattr(x, "get_seq_length") for x in tree_leaves((args, kwargs))):
            raise Unshareable("the model takes a cache of an earlier forward")
        entry = self.entry
        with Points.open(entry.count) as entry.points:
            try:
                return _split(self.forward(*args, **kwargs), entry.points)
            except Misused:
                raise
            except Exception as error:
                # A forward of its own tells whether it is the model's own error.
                raise Unshareable(f"{type(error).__name__} in the model: {error}") from error
            finally:
                entry.points = None


def _split(output: Any, points: Points) -> list[Any]:
    """What a forward at all points returned, for each of them."""
    leaves, kind = tree_flatten(output)
    each = []
    for leaf in leaves:
        if isinstance(leaf, PerturbedLogits):
            each.append(leaf.each())
        elif isinstance(leaf, torch.Tensor):
            # What the closure of one lane writes is not to be seen by the next.
            first, *rest = points.parts(leaf)
            each.append([first, *(t.clone() if t is first else t for t in rest)])
        else:
            each.append([leaf] * points.count)
    return [tree_unflatten(list(own), kind) for own in zip(*each, strict=True)] or (
        [output] * points.count
    )


def _equal(one: Any, other: Any) -> bool:
    """Whether two calls have the same arguments."""
    (flat, kind), (others, other_kind) = tree_flatten(one), tree_flatten(other)
    if kind != other_kind:
        return False
    for a, b in zip(flat, others, strict=True):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            if a is not b and not torch.equal(a, b):
                return False
        elif a is not b and a != b:
            return False
    return True
