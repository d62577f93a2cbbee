"""The forwards of a step: the closure, run again and again, each time as the first time."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zokernels.backends import shards
from zokernels.optim.written import Kept
from zokernels.perturb import Direction, InPlace, Move, OnEntry, Paired, RandomState

Closure = Callable[[], torch.Tensor | float]
# Around a forward, given the parameters that are perturbed in it: the others stay as they are. And
# whether its operations may be looked at.
Keeper = Callable[[Sequence[nn.Parameter], bool], contextlib.AbstractContextManager[None]]


@dataclass
class StepTiming:
    """Seconds of the last step: forwards without the noise made in them, noise, update, all.

    ``matrices`` is how many perturbed matrices the forwards have made in memory: with
    ``dist="rank1"`` those of operations that have no other way.

    With ``reuse_forward`` of `HybridZO` the backward counts among the forwards.
    ``waiting`` is what the exchange with other processes took: mostly, waiting for the slowest.
    """

    forwards: float = 0.0
    backward: float = 0.0
    noise: float = 0.0
    update: float = 0.0
    waiting: float = 0.0
    total: float = 0.0
    matrices: int = 0


def check_closure(closure: Closure | None) -> Closure:
    """The closure of a step, if a step can be made with it here.

    Raises:
        ValueError: If there is none.
        TypeError: If it is no function.
        RuntimeError: If weights can't be updated here.
    """
    if closure is None:
        raise ValueError(
            "step() got no closure, but the loss is evaluated at several points; pass a function "
            "that runs the forward and returns the loss: opt.step(lambda: model(**batch).loss)."
        )
    if not callable(closure):
        raise TypeError(
            f"step() got a {type(closure).__name__}, but the loss is evaluated at several points; "
            "pass the closure that makes it: opt.step(lambda: model(**batch).loss)."
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "step() runs inside torch.inference_mode, where weights can't be updated; use "
            "torch.no_grad instead, or nothing."
        )
    return closure


class Forward:
    """The closure as a forward to be repeated: same random numbers, same buffers, and a scalar.

    Args:
        closure: Runs a forward and returns the loss.
        replay_random: Makes it draw as the first did.
        buffers: The model's, which it may write.
        weights: Keeps those that it sees as they are stored.

    Attributes:
        looks: Whether operations are looked at for what they write, where that is not yet known.
        kind: A tensor of the last loss's type and device.
        rows: Where the closure gives a loss an example: those of each forward so far, in float64 on
            the CPU, by their mean, which is the forward's loss.
    """

    def __init__(
        self,
        closure: Closure,
        replay_random: Callable[[], None],
        buffers: Kept,
        weights: Keeper,
    ):
        self.closure, self.replay_random = closure, replay_random
        self.buffers, self.weights = buffers, weights
        self.looks = True
        self.kind = torch.zeros((), dtype=torch.float32)
        self.rows: dict[float, torch.Tensor] = {}

    def __call__(self, perturbed: Sequence[nn.Parameter] = ()) -> torch.Tensor | float:
        """The loss at the weights as they are, of which these are perturbed."""
        self.replay_random()
        self.buffers.put_back()
        # Of weights that have moved it would go on with the casts that it made before.
        torch.clear_autocast_cache()
        looking = self.buffers.looking() if self.looks else contextlib.nullcontext()
        with explaining_gradients(), self.weights(perturbed, self.looks), looking:
            loss = self.closure()
        if isinstance(loss, torch.Tensor):
            loss = shards.whole(loss)
        loss = self._mean(loss)
        check_loss(loss)
        if isinstance(loss, torch.Tensor):
            wide = loss.dtype if loss.dtype is torch.float64 else torch.float32
            self.kind = loss.detach().to(wide)
        return loss

    def _mean(self, loss: Any) -> Any:
        """The mean of a loss an example, which are kept; any other loss as it is."""
        is_rows = isinstance(loss, torch.Tensor) and loss.dim() == 1 and len(loss) > 1
        if not is_rows or not loss.is_floating_point():
            return loss
        mean = loss.to(torch.promote_types(loss.dtype, torch.float32)).mean()
        self.rows[float(mean.detach())] = loss.detach().to("cpu", torch.float64)
        return mean

    def tensor(self, loss: float) -> torch.Tensor:
        """A loss as a step returns it."""
        return torch.tensor(loss, dtype=self.kind.dtype, device=self.kind.device)


@contextlib.contextmanager
def explaining_gradients() -> Iterator[None]:
    """Says what to do where a closure calls backward, as that of another optimizer does."""
    try:
        yield
    except RuntimeError as error:
        # torch's words where a backward finds no graph, and where it finds it used.
        if not any(
            words in str(error) for words in ("does not require grad", "graph a second time")
        ):
            raise
        raise RuntimeError(
            "The closure takes a gradient, but step() needs its loss only, and runs it under "
            "torch.no_grad; take backward() and zero_grad() out of the closure. Where the loss "
            "itself has a derivative in it, take that under torch.enable_grad()."
        ) from error


def check_loss(loss: Any) -> None:
    """Raise ValueError unless what a closure returned is one real number."""
    what = "a tensor" if isinstance(loss, torch.Tensor) else f"a {type(loss).__name__}"
    shape = tuple(getattr(loss, "shape", ()))
    if math.prod(shape) != 1:
        raise ValueError(
            f"The closure returned {what} of shape {shape}, but the loss must be a "
            "scalar, or a tensor with one number an example; take its mean."
        )
    if isinstance(loss, torch.Tensor) and loss.is_complex():
        raise ValueError(
            "The closure returned a complex loss, but only a real one can be lowered; return its "
            "abs() or its real part."
        )
    # As `float` asks; of a string it would take the digits.
    if hasattr(loss, "__float__"):
        return
    if loss is None:
        what, way = "None", "end it with `return loss`"
    elif hasattr(loss, "loss"):
        way = "return output.loss"
    elif isinstance(loss, Mapping) and "loss" in loss:
        way = "return output['loss']"
    elif isinstance(loss, tuple | list):
        way = "return the loss alone, not `loss, logits`"
    else:
        way = "return the loss alone"
    raise ValueError(
        f"The closure returned {what}, but step() needs the loss, a scalar tensor or a number; "
        f"{way}."
    )


# Where to look: how each parameter moves (None: not at all), along which seeds, rounded by which.
Place = tuple[Sequence[Move] | None, Sequence[int], int]


class Losses:
    """The losses of a step's batch at points around θ.

    Args:
        run: The loss at the weights as they are, given the parameters that are perturbed.
        directions: Makes a direction of moves, seeds and ``rounding_seed``.
        perturber: Perturbs the model.
        timing: Where the time is noted.
        base: The loss at θ, if it is known.
        together: How many points share a forward: 1 for those of a block, which begin at the block
            from what the last one left.

    Attributes:
        base: The loss at θ, if it is known by now.
    """

    def __init__(
        self,
        run: Callable[[list[nn.Parameter]], torch.Tensor | float],
        directions: Callable[..., Direction],
        perturber: InPlace | OnEntry,
        timing: StepTiming,
        base: float | None,
        together: int,
    ):
        self.run, self.directions, self.perturber = run, directions, perturber
        self.timing, self.base = timing, base
        self.together = together if isinstance(perturber, Paired) else 1

    def of(self, places: Sequence[Place]) -> list[float]:
        """The loss at each of some places, which share a forward where that is possible."""
        before, noise_before = time.perf_counter(), self.perturber.seconds
        whole_before = self.perturber.matrices
        lanes = [
            None if moves is None else self.directions(moves, seeds, rounding_seed=rounding_seed)
            for moves, seeds, rounding_seed in places
        ]
        if self.together > 1 and len(lanes) > 1:
            assert isinstance(self.perturber, Paired)
            found = self.perturber.run_all(
                lanes, lambda: self.run(self.perturber.params), lambda: self.run([])
            )
            if None in lanes:
                self.base = found[lanes.index(None)]
        else:
            found = [self._at(lane) for lane in lanes]
        noise = self.perturber.seconds - noise_before
        self.timing.noise += noise
        self.timing.matrices += self.perturber.matrices - whole_before
        self.timing.forwards += time.perf_counter() - before - noise
        return found

    def _at(self, lane: Direction | None) -> float:
        if lane is not None:
            return self.perturber.run(lane, lambda: float(self.run(self.perturber.params)))
        if self.base is None:
            self.base = float(self.run([]))
        return self.base


@contextlib.contextmanager
def same_randomness(
    model: nn.Module | None, params: list[nn.Parameter]
) -> Iterator[Callable[[], None]]:
    """Dropout off; yields a function that makes the next forward draw as the first.

    Torch's own encoder layers have a path for inference, which is another function where words are
    padded, and which perturbed weights don't take: it is off, as it is in training by backprop.

    It does so for torch's generators on the CPU and on every CUDA device that holds a parameter,
    frozen ones included, and for Python's and NumPy's own.

    The root keeps its training flag, since trainers read it to tell training from evaluation;
    what it draws itself is replayed.
    """
    modules = [] if model is None else list(model.modules())
    others = (p for m in modules for p in m._parameters.values() if p is not None)
    state = RandomState(p.device for p in (*params, *others))

    switched = [m for m in modules if m.training and (len(modules) == 1 or m is not model)]
    for m in switched:
        m.training = False
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield state.restore
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        shards.settle(model)
        known = set(modules)
        for m in switched:
            m.training = True
            # A module that a forward has made took after the one around it.
            for child in m.children():
                if child not in known:
                    child.train()
