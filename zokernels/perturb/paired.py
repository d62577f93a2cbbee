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
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from zokernels.perturb.filling import Lane
from zokernels.perturb.logits import PerturbedLogits
from zokernels.perturb.on_entry import OnEntry
from zokernels.perturb.points import Points, is_about_points
from zokernels.perturb.randomness import RandomState
from zokernels.perturb.replaced import replaced_forward
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
        self,
        lanes: Sequence[Lane],
        forward: Callable[[], torch.Tensor | float],
        base: Callable[[], torch.Tensor | float],
    ) -> list[float]:
        """``forward()`` at every point: what `run` gives for each.

        Args:
            lanes: The points.
            forward: Runs the model and returns the loss.
            base: The same where nothing is perturbed.
        """

        def alone(lane: Lane) -> float:
            return float(base()) if lane is None else self.run(lane, lambda: float(forward()))

        if self.off is not None or len(lanes) == 1:
            return [alone(lane) for lane in lanes]
        known: dict[int, float] = {}
        if not self._is_settled:
            # A perturbed forward of its own tells which parameters no operation asks for.
            k = next((k for k, lane in enumerate(lanes) if lane is not None), 0)
            known[k] = alone(lanes[k])
        try:
            self.check_watched()
            return [float(loss) for loss in self.run_shared(lanes, forward)]
        except RuntimeError as error:
            if not (isinstance(error, Unshareable) or is_about_points(error)):
                raise
            why = str(error)
        found = [known[k] if k in known else alone(lane) for k, lane in enumerate(lanes)]
        # What a forward of its own raises as well has been raised by now.
        self._give_up(why)
        return found

    def run_shared(
        self, lanes: Sequence[Lane], forward: Callable[[], torch.Tensor | float]
    ) -> list[torch.Tensor | float]:
        """What ``forward()`` returns at every point, in one forward of the model.

        Raises:
            Unshareable: If the points can't share one.
        """
        found = []
        with _as_before_a_failure(self.model):
            with self.standing(lanes) as entry, self._shared_forward(entry) as shared:
                for lane in range(len(lanes)):
                    shared.closure_of(lane)
                    found.append(forward())
                # Whoever called the model may have caught it.
                if shared.failed is not None:
                    raise shared.failed
        return found

    @contextlib.contextmanager
    def _shared_forward(self, entry: Entry) -> Iterator[_SharedForward]:
        """The model's own forward replaced by one that all lanes share, inside the block."""
        shared = _SharedForward(self.model, entry)
        with replaced_forward(self.model, shared):
            try:
                yield shared
            finally:
                shared.end()

    def _give_up(self, why: str) -> None:
        self.off = why.strip().partition("\n")[0].rstrip(".")
        warnings.warn(
            f"perturb='paired' goes on as 'on_entry', one forward a point: {self.off}.",
            stacklevel=6,
        )


class _SharedForward:
    """A model's forward at all points, run for the first lane and remembered for the rest.

    Args:
        model: The module.
        entry: The perturbed weights.

    Attributes:
        failed: Why the lanes can't share it, once that is known.
    """

    def __init__(self, model: nn.Module, entry: Entry):
        self.model, self.entry = model, entry
        self.forward = model.forward
        self.failed: Unshareable | None = None
        # Callers look at the arguments that a forward has.
        functools.update_wrapper(self, self.forward)
        self._call = 0
        self._known: list[_Known] = []
        self._points: Points | None = None
        perturbed = set(entry.places)
        self._places = [
            (module, name, p)
            for module in model.modules()
            for name, p in module._parameters.items()
            if id(p) in perturbed
        ]

    def __deepcopy__(self, memo: dict) -> NoReturn:
        """A copy of the model would share its forward's memory."""
        self.failed = Unshareable("the closure copies the model")
        raise self.failed

    def closure_of(self, lane: int) -> None:
        """The closure of this lane begins."""
        self._call = 0
        self.entry.closure_of(lane)

    def end(self) -> None:
        """Let go of the outputs: logits that only wait here need not be computed."""
        self._known.clear()
        if self._points is not None:
            _leave_the_last(self.model, self._points)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the current lane."""
        if self.entry.points is not None:
            return self.forward(*args, **kwargs)
        try:
            return self._of_lane(args, kwargs)
        except Unshareable as why:
            self.failed = why
            raise

    def _of_lane(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        entry, call = self.entry, self._call
        self._call += 1
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in given):
            raise Unshareable("the closure runs the model inside of a transform of torch.func")
        if any(_is_derived(t) for t in given):
            raise Unshareable("the closure takes a derivative by what it gives the model")
        if self.model._forward_pre_hooks:
            raise Unshareable("what the model's own hooks do before it can't be shared")
        if any(m._parameters.get(name) is not p for m, name, p in self._places):
            raise Unshareable("the closure gives the model other weights")
        if entry.lane == 0:
            outputs = self._run(args, kwargs)
            devices = [p.device for p in entry.filler.sources]
            # In a graph's capture nothing is drawn, and no generator can be asked.
            on_gpu = any(on.type == "cuda" for on in devices)
            is_captured = on_gpu and torch.cuda.is_current_stream_capturing()
            state = None if is_captured else RandomState(devices)
            self._known.append(_Known((args, kwargs), outputs, state))
        if call >= len(self._known) or not _equal(self._known[call].given, (args, kwargs)):
            raise Unshareable("the closure's forwards do not see the same batch each time")
        known = self._known[call]
        if entry.lane > 0 and known.random is not None:
            # What is drawn from here on is what the first closure drew.
            known.random.restore()
        return known.outputs[entry.lane]

    def _run(self, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
        """The model's outputs, for each lane."""
        leaves = tree_leaves((args, kwargs))
        if any(hasattr(x, "get_seq_length") for x in leaves):
            raise Unshareable("the model takes a cache of an earlier forward")
        tensors = [t for t in leaves if isinstance(t, torch.Tensor) and not t.is_inference()]
        versions = [t._version for t in tensors]
        entry = self.entry
        with Points.open(entry.count) as points:
            self._points = entry.points = points
            try:
                outputs = _split(self.forward(*args, **kwargs), points)
            except Misused:
                raise
            except Exception as error:
                # A forward of its own tells whether it is the model's own error.
                raise Unshareable(f"{type(error).__name__} in the model: {error}") from error
            finally:
                entry.points = None
        if points.failed is not None:
            raise Unshareable(f"{type(points.failed).__name__} in the model: {points.failed}")
        if versions != [t._version for t in tensors]:
            raise Unshareable("the model writes into its batch")
        return outputs


class _Known(NamedTuple):
    """A call of the model: its arguments, its outputs for each lane, and the generators then."""

    given: tuple
    outputs: list[Any]
    random: RandomState | None


@contextlib.contextmanager
def _as_before_a_failure(model: nn.Module) -> Iterator[None]:
    """Where the block raises, the model's modules have the attributes that they had before it.

    A forward that is given up halfway has not taken back what it did to the model: a counter, a
    parametrization, a hook. Weights and buffers keep their values, which are others' to put back.
    """
    before = [(m, type(m), vars(m).copy(), _contents(m)) for m in model.modules()]
    try:
        yield
    except BaseException:
        for module, kind, own, contents in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(own)
            for name, value in own.items():
                if type(value) in _CONTAINERS:
                    value.clear()
                    add = value.extend if type(value) is list else value.update
                    add(contents.get(name, ()))
        raise


_CONTAINERS = {list, dict, set, OrderedDict}


def _contents(module: nn.Module) -> dict[str, Any]:
    """What is in the containers among a module's attributes, of which most are empty."""
    own = vars(module).items()
    return {name: x.copy() for name, x in own if x.__class__ in _CONTAINERS and x}


def _leave_the_last(model: nn.Module, points: Points) -> None:
    """What the model keeps of a forward at all points becomes what the last one left."""

    def last(t: torch.Tensor) -> torch.Tensor:
        return t if points.whole(t) is None else points.parts(t)[-1]

    for module in model.modules():
        own = vars(module)
        for name, value in list(own.items()):
            if isinstance(value, torch.Tensor):
                own[name] = last(value)
            elif type(value) in (list, tuple, dict) and name not in ("_parameters", "_modules"):
                found = [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
                if any(points.whole(t) is not None for t in found):
                    own[name] = tree_map_only(torch.Tensor, last, value)


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


def _is_derived(t: torch.Tensor) -> bool:
    """Whether a derivative by it may be taken, from either end."""
    by_tape = torch.is_grad_enabled() and t.requires_grad
    return by_tape or forward_ad.unpack_dual(t).tangent is not None


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
