"""Several points in one forward: a batch repeated once a point, each part with its own weights.

Layer by layer, each weight is read once and each direction drawn once, for θ + εz and θ − εz alike;
what has no weights runs on the whole batch. The closure is still called once a point: the model's
forward runs in the first call, and the others get their part of its outputs from memory.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from zokernels.perturb.direction import Direction, Move
from zokernels.perturb.filling import Lane
from zokernels.perturb.logits import LaneLosses, PerturbedLogits
from zokernels.perturb.on_entry import OnEntry
from zokernels.perturb.weight import Entry, Unshareable

# The argument that tells the size of a batch, where a model has one of these.
_BATCHES = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features")


class Paired(OnEntry):
    """Perturbs as `OnEntry` does, and runs several points as one forward where the model allows.

    The first step compares the parts of such a forward with forwards of their own, at a distance at
    which they differ plainly. A model whose parts differ from those, and a closure that can't be
    shared, go on one forward a point, with one message.

    Attributes:
        off: Why every point has its own forward, or None.
    """

    off: str | None = None
    _is_checked = False
    _losses_apart = False

    def run_all(
        self, lanes: Sequence[Lane], forward: Callable[[], torch.Tensor | float]
    ) -> list[float]:
        """``forward()`` at every point: what `run` gives for each."""
        if self.off is None and len(lanes) > 1:
            try:
                if not self._is_checked:
                    self._check(lanes, forward)
                return [float(loss) for loss in self.run_shared(lanes, forward)]
            except Unshareable as why:
                self._give_up(str(why))
        return [self._run_alone(lane, forward) for lane in lanes]

    def _run_alone(self, lane: Lane, forward: Callable[[], torch.Tensor | float]) -> float:
        return float(forward()) if lane is None else self.run(lane, lambda: float(forward()))

    def run_shared(
        self, lanes: Sequence[Lane], forward: Callable[[], torch.Tensor | float]
    ) -> list[torch.Tensor | float]:
        """What ``forward()`` returns at every point, in one forward of the model.

        Raises:
            Unshareable: If the points can't share one.
        """
        try:
            return self._run_once(lanes, forward)
        except _Inseparable:
            # A loss over the whole batch: its function is asked for one loss a lane from now on.
            self._losses_apart = True
        try:
            return self._run_once(lanes, forward)
        except _Inseparable as why:
            raise Unshareable(str(why)) from None

    def _run_once(
        self, lanes: Sequence[Lane], forward: Callable[[], torch.Tensor | float]
    ) -> list[torch.Tensor | float]:
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
        shared = _SharedForward(self.model.forward, entry, self._losses_apart)
        vars(self.model)["forward"] = shared
        try:
            yield shared
        finally:
            shared.forget()
            if before is None:
                vars(self.model).pop("forward", None)
            else:
                vars(self.model)["forward"] = before

    def _check(self, lanes: Sequence[Lane], forward: Callable[[], torch.Tensor | float]) -> None:
        """Raise Unshareable unless the parts of a shared forward are forwards of their own."""
        direction = next(lane for lane in lanes if lane is not None)
        # Zero times the noise, and not a plain forward: there the logits would be whole in memory.
        here = self._run_alone(_scaled(direction, 0.0), forward)
        if not math.isfinite(here):
            return
        # A loss's rounding hides small differences: go so far that the loss changes by a tenth.
        for power in range(12):
            far = _scaled(direction, 4.0**power)
            there = self._run_alone(far, forward)
            if not math.isfinite(there) or abs(there - here) > 0.1 * abs(here):
                break
        if self._hooks.holders:
            kind = type(self._hooks.holders[0]).__name__
            raise Unshareable(f"{kind} keeps its weights in a list of its own")
        if math.isfinite(there):
            margin = max(abs(there - here) / 8, 1e-3 * abs(here))
            parts = map(float, self.run_shared([far, None], forward))
            for alone, part in zip((there, here), parts, strict=True):
                if not abs(part - alone) <= margin:
                    raise Unshareable(
                        f"a loss of {alone:.6g} came out as {part:.6g} in a forward of both points"
                    )
        self._is_checked = True

    def _give_up(self, why: str) -> None:
        self.off = why
        warnings.warn(
            f"perturb='paired' goes on as 'on_entry', one forward a point: {why}.", stacklevel=6
        )


class _Inseparable(Exception):
    """An output mixes the lanes."""


class _SharedForward:
    """A model's forward over the batch of all lanes, run for the first and remembered for the rest.

    Args:
        forward: The model's.
        entry: The perturbed weights.
        losses_apart: Have loss functions give one loss a lane.
    """

    def __init__(self, forward: Callable[..., Any], entry: Entry, losses_apart: bool):
        self.forward = forward
        self.entry = entry
        self.losses_apart = losses_apart
        # Callers look at the arguments that a forward has.
        functools.update_wrapper(self, forward)
        self._lane = 0
        self._call = 0
        self._known: list[tuple[Any, list[Any]]] = []
        self._is_inside = False

    def closure_of(self, lane: int) -> None:
        """The closure of this lane begins."""
        self._lane, self._call = lane, 0
        self.entry.closure_of(lane)

    def forget(self) -> None:
        """Let go of the outputs: logits that only wait here need not be computed."""
        self._known.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the current lane."""
        if self._is_inside:
            return self.forward(*args, **kwargs)
        given = (args, kwargs)
        call = self._call
        self._call += 1
        if self._lane == 0:
            self._known.append((given, self._split(self._run(args, kwargs))))
        if call >= len(self._known) or not _equal(self._known[call][0], given):
            raise Unshareable("the closure's forwards do not see the same batch each time")
        return self._known[call][1][self._lane]

    def _run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        rows = _rows_of(args, kwargs)
        count = self.entry.count

        def repeat(t: torch.Tensor) -> torch.Tensor:
            if t.dim() == 0 or (t.shape[0] == 1 and rows > 1):
                return t
            if t.shape[0] != rows:
                raise Unshareable(
                    f"the model takes a tensor of shape {tuple(t.shape)} beside a batch of {rows}"
                )
            return t.repeat(count, *[1] * (t.dim() - 1))

        if any(hasattr(x, "get_seq_length") for x in tree_leaves((args, kwargs))):
            raise Unshareable("the model takes a cache of an earlier forward")
        args, kwargs = tree_map_only(torch.Tensor, repeat, (args, kwargs))
        self.entry.rows = count * rows
        self._is_inside = True
        try:
            apart = _LossesApart(count) if self.losses_apart else contextlib.nullcontext()
            with apart:
                return self.forward(*args, **kwargs)
        finally:
            self._is_inside = False
            self.entry.rows = 0

    def _split(self, output: Any) -> list[Any]:
        count = self.entry.count

        def part(lane: int) -> Callable[[torch.Tensor], torch.Tensor]:
            def of(t: torch.Tensor) -> torch.Tensor:
                if isinstance(t, LaneLosses):
                    return t.as_subclass(torch.Tensor)[lane]
                if isinstance(t, PerturbedLogits):
                    return t.of_lane(lane)
                if t.dim() == 0 or t.shape[0] % count:
                    raise _Inseparable(
                        f"an output of shape {tuple(t.shape)} mixes the parts of the batch"
                    )
                return t.chunk(count)[lane]

            return of

        return [tree_map_only(torch.Tensor, part(lane), output) for lane in range(count)]


class _LossesApart(TorchFunctionMode):
    """Makes loss functions give one loss a lane."""

    _functions = (
        F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss,
        F.binary_cross_entropy_with_logits,
    )  # fmt: skip

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self._functions or kwargs.get("reduction") == "none" or len(args) < 2:
            return func(*args, **kwargs)
        value, target, *rest = args
        if isinstance(value, PerturbedLogits) or len(value) % self.count:
            return func(*args, **kwargs)
        parts = zip(value.chunk(self.count), target.chunk(self.count), strict=True)
        losses = torch.stack([func(v, t, *rest, **kwargs) for v, t in parts])
        return losses.as_subclass(LaneLosses)


def _rows_of(args: tuple, kwargs: dict[str, Any]) -> int:
    named = [kwargs[name] for name in _BATCHES if isinstance(kwargs.get(name), torch.Tensor)]
    tensors = [t for t in tree_leaves((named, args, kwargs)) if isinstance(t, torch.Tensor)]
    batch = next((t for t in tensors if t.dim()), None)
    if batch is None:
        raise Unshareable("the model takes no tensor that could be its batch")
    return batch.shape[0]


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


def _scaled(direction: Direction, factor: float) -> Direction:
    moves = {m: Move(tuple(factor * s for s in m.scales)) for m in set(direction.moves)}
    return Direction(
        direction.params, direction.streams, [moves[m] for m in direction.moves], direction.seeds,
        direction.dist, direction.mask, direction.backend, direction.rounding_seed,
    )  # fmt: skip
