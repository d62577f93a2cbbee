"""A step of an optimizer, captured once and replayed."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from zokernels import ops
from zokernels.backends import tracer
from zokernels.estimators import Estimate
from zokernels.graphs import support
from zokernels.graphs.batch import StaticBatch
from zokernels.graphs.numbers import StepNumbers
from zokernels.optim.base import ZOOptimizer
from zokernels.optim.forward import StepTiming, same_randomness
from zokernels.optim.groups import join_masks
from zokernels.perturb import DeferredDirection, Direction, InPlace, Move, Paired


class _Done(NamedTuple):
    """A step whose outcome is on its way to the host."""

    outcome: torch.Tensor
    arrived: torch.cuda.Event | None
    eps: list[float]


class GraphedStep:
    """A step of a zeroth-order optimizer as one CUDA graph: forwards, projected gradients, update.

    The graph is captured here, with its own copy of a batch, and each call replays it: the batch is
    copied, seeds, scales, learning rates and decays are written in one small copy, and nothing
    waits for the device. The weights are those of ``opt.step`` bit for bit where the losses are. A
    loss that is not finite is met on the device: that step writes no weight.

    The host reads the losses of a step while the next one runs, or at `read`; with a trajectory
    (``opt.record``) after every step, which then waits for its end. ``opt.projected_gradients`` and
    ``opt.bad_steps`` are those of the last step that was read.

    Args:
        opt: `ZOSGD`, `ZOSGDSign`, `ZOSGDMomentum` or `ZOAdam`. Schedulers, ``state_dict``,
            ``record`` and ``opt.step`` itself go on working. A setting that the graph has fixed
            (``num_queries``, a mask, which parameters are trained …) may not change after it.
            Record, resume or load a state before the graph is made: it fixes where states are.
        loss_fn: Takes a batch and returns its loss, a tensor of one element. It may not read a
            tensor on the host (``.item()``, ``if loss > 1``) or draw random numbers, and sees its
            own static tensors. Dropout is off.
        example_batch: A batch of the shapes to come: tensors in dicts, lists and tuples. Its loss
            must be finite. It is run a few times, and no weight changes.
        capture: Capture a graph. Without, the same step runs launch by launch on any device: for
            tests, and to see where an error comes from.

    Attributes:
        opt: The optimizer.

    Raises:
        TypeError: If the optimizer's rule can't be captured, or the loss isn't a tensor.
        ValueError: If its settings or device can't, or the example's loss is not finite.
        RuntimeError: If the forward does what can't be captured.

    Example:
        >>> step = zk.GraphedStep(opt, lambda batch: model(**batch).loss, batches[0])
        >>> for batch in batches:
        ...     loss = step(batch)
        >>> step.read()
    """

    def __init__(
        self,
        opt: ZOOptimizer,
        loss_fn: Callable[[Any], torch.Tensor],
        example_batch: Any,
        *,
        capture: bool = True,
    ):
        opt._look()
        support.check(opt, capture)
        self.opt = opt
        self._loss_fn = loss_fn
        self._pending: deque[_Done] = deque()
        self._bad_losses: list[float] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        groups = opt._chosen(None)
        self._params = [g["params"][i] for g, chosen in groups for i in chosen]
        self._device = self._params[0].device
        opt._begin(self._params)
        self._batch = StaticBatch(example_batch, self._device)
        with torch.no_grad(), same_randomness(opt.model, self._params):
            kind = self._perturb_and_try()
            self._numbers = StepNumbers(opt, groups)
            kinds = [g for g, (_, chosen) in enumerate(groups) for _ in chosen]
            like = self._direction(0, 1.0)
            self._lanes = [
                at and DeferredDirection(like, self._numbers.move(*at), kinds)
                for at in self._numbers.points
            ]
            if self._numbers.estimator == "two_sided" and like.mask is None:
                for one, other in zip(self._lanes[::2], self._lanes[1::2], strict=True):
                    assert one is not None
                    one.other = other
            with self._as_compiled():
                self._prepare(capture)
        # Outside of the graph: what it gives is overwritten by the next step.
        self._kind = kind
        self._settings = support.settings(opt)

    @torch.no_grad()
    def __call__(self, batch: Any) -> torch.Tensor:
        """One step on a batch.

        Args:
            batch: Built and shaped as ``example_batch``, on any device.

        Returns:
            The mean of the losses, or one-sided the base loss: a detached scalar on the device,
            which nobody has waited for.

        Raises:
            ValueError: If the batch does not fit the graph; nothing has run then.
            RuntimeError: If a setting has changed that the graph has fixed.
            TrajectoryError: If the trajectory cannot take the record; see `ZOSGD.step`.
            FloatingPointError: After ``max_bad_steps`` steps in a row with a loss that was not
                finite, which without a trajectory is noticed a step late. No weight was changed.
        """
        started, opt = time.perf_counter(), self.opt
        self._check_settings()
        number = opt.param_groups[0]["step"]
        if opt.trajectory:
            opt.trajectory.begin(number)
        self._batch.fill(batch)
        self._numbers.write(told=not self._pending)
        self._run()
        loss = self._numbers.loss.to(self._kind, copy=True)
        self._pending.append(self._fetch())
        if opt.trajectory:
            self._settle(recording=True)
        for group in opt.param_groups:
            group["step"] = number + 1
        if opt.trajectory:
            opt.trajectory.write(number, opt.bad_steps > 0, opt._moments())
        # What torch's schedulers look at, to warn of a rate that was never used.
        vars(opt)["_opt_called"] = True
        opt.timing = StepTiming(total=time.perf_counter() - started)
        self._settle(leave=0 if opt.trajectory else 1)
        self._raise_if_bad()
        return loss

    def read(self) -> None:
        """Wait for the last step, and bring the optimizer's counters up to date.

        Raises:
            FloatingPointError: As for a call.
        """
        self._settle()
        self._raise_if_bad()

    def _perturb_and_try(self) -> torch.dtype:
        """Make what perturbs the model, by the mode that works for its forwards, and try them."""
        opt, mode = self.opt, ""
        # The first try shows whether they enter the model by something compiled.
        while opt.perturb != mode:
            mode = opt.perturb
            # Its own, since the graph holds the addresses of its memory. Logits that wait ask how
            # many positions count, and only the host could say it.
            self._perturber = opt._perturbers.make(self._params, lazy_logits=False, keep=True)
            with opt._buffers.kept() as buffers, opt._perturbers.forwards(), buffers.looking():
                kind = self._try()
            opt._look()
        return kind

    def _as_compiled(self) -> contextlib.AbstractContextManager[None]:
        """Around forwards: what is compiled runs so where it sees perturbed weights."""
        in_place = isinstance(self._perturber, InPlace)
        return contextlib.nullcontext() if in_place else tracer.eager()

    def _try(self) -> torch.dtype:
        """Run the forwards once as `opt.step` does, so that the perturber knows the model.

        Returns the type of the loss that is returned.
        """
        model = self.opt.model
        buffers = [] if model is None else list(model.buffers())
        versions, random = [b._version for b in buffers], _random_states(self._device)
        loss = self._forward()
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or loss.device != self._device:
            what = (
                f"a tensor of shape {tuple(loss.shape)} on {loss.device}"
                if isinstance(loss, torch.Tensor)
                else f"a {type(loss).__name__}"
            )
            raise TypeError(
                f"loss_fn returned {what}, but a captured step needs its loss as a tensor of one "
                f"element on {self._device}."
            )
        if not all(map(torch.equal, random, _random_states(self._device))):
            raise RuntimeError(
                "loss_fn draws random numbers, which would differ between the two sides of a "
                "direction in a captured step; switch that off, or use opt.step(closure)."
            )
        if versions != [b._version for b in buffers]:
            raise RuntimeError(
                "The forward writes buffers of the model, which a captured step can't put back; "
                "freeze them, or use opt.step(closure)."
            )
        here = float(loss)
        sides = [self._direction(0, 1.0), self._direction(0, -1.0)]
        with self._perturber.session():
            if isinstance(self._perturber, Paired):
                found = self._perturber.run_all(sides, self._forward, self._forward)
            else:
                found = [self._perturber.run(s, lambda: float(self._forward())) for s in sides]
        if not all(map(math.isfinite, [here, *found])):
            raise ValueError(
                f"The losses of the example batch are {[here, *found]}, but to capture a step they "
                "must be finite; give another batch, or a smaller eps."
            )
        return loss.dtype if loss.dtype is torch.float64 else torch.float32

    def _direction(self, query: int, side: float) -> Direction:
        """The direction of the optimizer's present step, with its numbers."""
        opt = self.opt
        return Direction(
            self._params,
            [g["streams"][i] for g, chosen in opt._chosen(None) for i in chosen],
            [Move((side * float(g["eps"]),)) for g, chosen in opt._chosen(None) for _ in chosen],
            [opt._seeds(None)[query]],
            opt.param_groups[0]["dist"],
            join_masks(opt._chosen(None)),
            opt.backend,
        )

    def _prepare(self, capture: bool) -> None:
        """Run the step so often that its memory and its kernels are there, and capture it."""
        self._numbers.write(enabled=False)
        if not capture:
            return
        # Streams, events and the capture itself are the current device's.
        with torch.cuda.device(self._device):
            self._capture()

    def _capture(self) -> None:
        """Warm up on the stream that is captured, and by the way that the capture takes."""
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        lanes = list(filter(None, self._lanes))
        side.wait_stream(here)
        try:
            with torch.cuda.stream(side), support.as_if_capturing():
                self._body()
                for lane in lanes:
                    lane.forget()
                self._body()
                for lane in lanes:
                    lane.is_closed = True
                # A read on the host is an error here: in a capture it would break the process's
                # allocator and generator for what comes after.
                with support.no_waiting():
                    self._body()
            here.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads, as a data loader's, go on allocating.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                self._body()
        except RuntimeError as error:
            # A capture that fails leaves its stream the current one.
            torch.cuda.set_stream(here)
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RuntimeError(
                f"The step could not be captured: {reason} loss_fn may not read a tensor on the "
                "host, nor a model compiled with mode='reduce-overhead' capture graphs of its own; "
                "capture=False runs the same step without a graph."
            ) from error
        self._graph = graph

    def _run(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            alike = same_randomness(self.opt.model, self._params)
            kept = self.opt._buffers.kept()
            with kept as buffers, alike, self._as_compiled(), buffers.looking():
                self._body()
        # Autograd then notices when a tensor it saved was written behind its back.
        torch.autograd.graph.increment_version([p for p in self._params if not p.is_inference()])

    def _body(self) -> None:
        """What is captured: no word of it comes from the host, and none goes there."""
        with self._perturber.session():
            together = isinstance(self._perturber, Paired) and not self._perturber.off
            size = self.opt._together if together else 1
            losses: list[Any] = []
            for i in range(0, len(self._lanes), size):
                losses += self._losses_at(self._lanes[i : i + size])
        self._numbers.apply(losses)

    def _losses_at(self, lanes: Sequence[DeferredDirection | None]) -> list[Any]:
        if len(lanes) > 1:
            assert isinstance(self._perturber, Paired)
            return list(self._perturber.run_shared(lanes, self._forward))
        with contextlib.nullcontext() if lanes[0] is None else self._perturber.at(lanes[0]):
            return [self._forward()]

    def _forward(self) -> torch.Tensor:
        return self._loss_fn(self._batch.value)

    def _fetch(self) -> _Done:
        outcome = self._numbers.outcome
        eps = [float(g["eps"]) for g, _ in self._numbers.groups]
        if not outcome.is_cuda:
            return _Done(outcome.clone(), None, eps)
        here = torch.empty_like(outcome, device="cpu", pin_memory=True)
        here.copy_(outcome, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return _Done(here, arrived, eps)

    def _settle(self, leave: int = 0, recording: bool = False) -> None:
        """Take in the outcomes of all but the last ``leave`` steps; of the newest, record it."""
        while len(self._pending) > leave:
            done = self._pending.popleft()
            if done.arrived is not None:
                done.arrived.synchronize()
            self._take_in(done, recording and not self._pending)

    def _take_in(self, done: _Done, recording: bool) -> None:
        opt, numbers = self.opt, self._numbers
        *losses, finite = done.outcome.tolist()
        if not finite:
            opt.bad_steps += 1
            opt.projected_gradients = [math.nan] * numbers.queries
            self._bad_losses = losses
            return
        opt.bad_steps, self._bad_losses = 0, None
        found = Estimate.of(numbers.estimator, range(numbers.queries), [losses])
        opt.projected_gradients = [d / done.eps[0] for d in found.differences]
        opt._scale(found, numbers.groups, None, done.eps)
        opt._keep_moments(found, numbers.groups, None)
        opt._count_flat([found])
        if recording:
            # The rule's passes as the host would make them, told to the trajectory and not run.
            with opt._listening(), ops.taking(lambda *_: None):
                for (group, chosen), gradients in zip(numbers.groups, found.gradients, strict=True):
                    if gradients is not None:
                        opt._update(group, chosen, opt._seeds(None), gradients)

    def _raise_if_bad(self) -> None:
        bad, self._bad_losses = self._bad_losses, None
        # Of a bad step that was told of once the next call says nothing.
        if bad and self.opt.bad_steps >= self.opt.max_bad_steps:
            raise FloatingPointError(
                f"The loss was not finite in {self.opt.bad_steps} steps in a row (the last losses: "
                f"{bad}), so no weight was changed in them; lower lr or eps, or look "
                "at the data."
            )

    def _check_settings(self) -> None:
        self.opt._look()
        now = support.settings(self.opt)
        changed = [str(a[0]) for a, b in zip(now, self._settings, strict=False) if a != b]
        if changed or len(now) != len(self._settings):
            raise RuntimeError(
                f"{', '.join(dict.fromkeys(changed)) or 'The param groups'} changed since the step "
                "was captured, whose graph holds them as they were (of parameters and states: "
                "where they are); make a new GraphedStep."
            )


def _random_states(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
