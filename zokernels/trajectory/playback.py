"""Running recorded steps again: the weights go through memory once for many steps."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from zokernels import masks, passes
from zokernels.backends import layouts, rules
from zokernels.estimators import ROUNDING, derive_seed
from zokernels.trajectory.checksum import checksum, kind, shape
from zokernels.trajectory.format import Scalars, TrajectoryError
from zokernels.trajectory.reader import Trajectory

M = TypeVar("M", bound=nn.Module | Sequence[torch.Tensor])
States = dict[int, dict[str, torch.Tensor]]

# At 256 steps a pass, reading and writing the weights is below 1% of making the noise.
CHUNK = 256


def replay(
    model: M,
    path: str | Path,
    until: int | None = None,
    *,
    backend: str | None = None,
    chunk: int = CHUNK,
) -> M:
    """Make the fine-tuned model from the base model and the run's log, bit for bit.

    To go back to an earlier step, load the base model again and replay until there.

    Args:
        model: The model as it was when the recording began; for an optimizer of bare parameters
            those, in their order. It is changed in place.
        path: The trajectory, a file.
        until: Number of steps; all that are recorded by default.
        backend: As for `zokernels.ops.add_noise_`; it does not change a bit of the result.
        chunk: Steps in one pass over the weights.

    Returns:
        The model.

    Raises:
        TrajectoryError: If the file is damaged, the steps are not in it, or the model is not the
            one that was recorded. Nothing has been written then.
    """
    trajectory = Trajectory(path)
    until = trajectory.until(until)
    tensors = match(trajectory, model)
    if trajectory.torn:
        warnings.warn(
            f"The last record of {path} was cut short ({trajectory.torn} bytes): the steps before "
            f"it, up to {trajectory.end}, are whole.",
            stacklevel=2,
        )
    play(trajectory, tensors, until, {}, backend=backend, chunk=chunk)
    return model


def match(trajectory: Trajectory, model: nn.Module | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The model's tensors in the trajectory's order, each checked to be what was recorded.

    Raises:
        TrajectoryError: Naming the parameter that is missing, or differs, and how.
    """
    path = trajectory.path
    if not trajectory.header["replayable"]:
        raise TrajectoryError(
            f"{path} was recorded by {trajectory.header['optimizer']}, whose steps are not all "
            "made of recorded scalars, so it can't be replayed; use the run's saved weights."
        )
    named = (
        dict(model.named_parameters())
        if isinstance(model, nn.Module)
        else {str(i): p for i, p in enumerate(model)}
    )
    found = []
    for p in trajectory.header["parameters"]:
        name = p["name"]
        if name not in named:
            raise TrajectoryError(
                f"The model has no parameter {name!r}, which {path} was recorded with; load the "
                "model that the run began with."
            )
        t = named.pop(name)
        for what, is_, was in (
            ("shape", shape(t), p["shape"]),
            ("type", str(t.dtype).removeprefix("torch."), p["dtype"]),
        ):
            if is_ != was:
                raise TrajectoryError(
                    f"Parameter {name!r} has {what} {is_}, but it had {was} when {path} was "
                    "recorded; load the model as the run did."
                )
        found.append(t)
    if named:
        raise TrajectoryError(
            f"The model has a parameter {next(iter(named))!r}, which {path} was not recorded with; "
            "load the model that the run began with."
        )
    for p, t in zip(trajectory.header["parameters"], found, strict=True):
        # Of what could not be read when the run began there is nothing to compare.
        if p["check"] is None or (check := checksum(t)) == p["check"]:
            continue
        if check is None:
            raise TrajectoryError(
                f"Parameter {p['name']!r} is {kind(t)} here, so it can't be compared with what "
                f"it was when {path} was begun; load the base model into memory."
            )
        raise TrajectoryError(
            f"Parameter {p['name']!r} is not what it was when {path} was begun (their "
            "checksums differ); load the base model of that run, before any training."
        )
    return found


def play(
    trajectory: Trajectory,
    tensors: Sequence[torch.Tensor],
    until: int,
    states: States,
    *,
    backend: str | None = None,
    chunk: int = CHUNK,
) -> None:
    """Run the recorded passes up to a step over the tensors of `match`.

    Args:
        trajectory: What to run.
        tensors: The parameters in its order, as they were at its start.
        until: Number of the step to reach.
        states: The rules' states by parameter, which begin as zeros and are left here.
        backend: As for `zokernels.ops.add_noise_`.
        chunk: Steps in one pass.
    """
    # The others are frozen, and need not be of a kind that a pass could take.
    written = {i: tensors[i] for described in trajectory.passes for i in described["parameters"]}
    _check_written(trajectory, written)
    # All passes over no element at all: what one of them refuses is refused before a byte is
    # written by those before it.
    empty = {i: t.detach().new_empty(0) for i, t in written.items()}
    try:
        _play(_Player(trajectory, empty, {}, backend, chunk), until)
    except (TypeError, ValueError, KeyError, OverflowError, struct.error) as error:
        raise TrajectoryError(f"{trajectory.path} can't be replayed: {error}") from None
    _play(_Player(trajectory, written, states, backend, chunk), until)


def _play(player: _Player, until: int) -> None:
    for step in player.trajectory.steps[: until - player.trajectory.header["first"]]:
        for scalars in step.passes or ():
            player.add(step.number, scalars)
    player.finish()


class _Player:
    """Gathers the passes of successive steps that can run as one."""

    def __init__(
        self,
        trajectory: Trajectory,
        tensors: Mapping[int, torch.Tensor],
        states: States,
        backend: str | None,
        chunk: int,
    ):
        self.trajectory = trajectory
        self.tensors = tensors
        self.states = states
        self.backend = backend
        self.chunk = chunk
        self._waiting: dict[int, list[Scalars]] = {}
        self._touched = [set(d["parameters"]) for d in trajectory.passes]

    def add(self, number: int, scalars: Scalars) -> None:
        """One pass of the step with this number; it runs when no more can join it."""
        complete = self._complete(number, scalars)
        for other in list(self._waiting):
            if other != complete.of and self._touched[other] & self._touched[complete.of]:
                self._run(other)
        waiting = self._waiting.setdefault(complete.of, [])
        if waiting and not (len(waiting) < self.chunk and _joins(waiting[-1], complete)):
            self._run(complete.of)
            waiting = self._waiting.setdefault(complete.of, [])
        waiting.append(complete)

    def finish(self) -> None:
        """Runs all that waits."""
        for of in list(self._waiting):
            self._run(of)

    def _complete(self, number: int, scalars: Scalars) -> Scalars:
        """The scalars with the seeds that were left out because they follow from the step."""
        seed = self.trajectory.header["seed"]
        derived: dict[str, Any] = {}
        if scalars.seeds is None:
            count = range(len(scalars.coeffs))
            derived["seeds"] = tuple(derive_seed(seed, number, k) for k in count)
        if scalars.rounding_seed is None:
            derived["rounding_seed"] = derive_seed(seed, number, 0, ROUNDING)
        return replace(scalars, **derived)

    def _run(self, of: int) -> None:
        steps = self._waiting.pop(of)
        described, first = self.trajectory.passes[of], steps[0]
        mask = described["mask"]
        if first.mask_seed is not None:
            mask = {**mask, "seed": first.mask_seed}
        which = described["parameters"]
        params = [self.tensors[i].detach() for i in which]
        seeds = [s for step in steps for s in step.seeds or ()]
        coeffs = [c for step in steps for c in step.coeffs]
        options = dict(
            streams=[self.trajectory.header["parameters"][i]["stream"] for i in which],
            dist=described["dist"],
            mask=masks.from_plain(mask),
            decay=[step.decay for step in steps],
            rounding=described["rounding"],
            rounding_seed=[step.rounding_seed for step in steps],
            each_step=len(first.coeffs),
            backend=self.backend,
        )
        if described["rule"] == "add_noise":
            passes.add_noise_(params, seeds, coeffs, **options)
            return
        passes.apply_update_(
            params,
            [self._state(of, place) for place in range(len(which))],
            described["rule"],
            seeds,
            coeffs,
            lr=[step.lr or 0.0 for step in steps],
            step=first.count,
            **described["numbers"],
            **options,
        )

    def _state(self, of: int, place: int) -> dict[str, torch.Tensor]:
        described = self.trajectory.passes[of]
        which = described["parameters"][place]
        p, state = self.tensors[which], self.states.setdefault(which, {})
        names = rules.state_names(described["rule"], described["numbers"]["amsgrad"])
        for name, dtype in zip(names, described["states"][place], strict=True):
            if name not in state:
                state[name] = torch.zeros_like(
                    p, dtype=getattr(torch, dtype), memory_format=torch.contiguous_format
                )
        return state


def _joins(last: Scalars, after: Scalars) -> bool:
    """Whether a pass may run together with the one before it."""
    counted = after.count is None if last.count is None else after.count == last.count + 1
    return len(last.coeffs) == len(after.coeffs) and last.mask_seed == after.mask_seed and counted


def _check_written(trajectory: Trajectory, tensors: Mapping[int, torch.Tensor]) -> None:
    """Refuse, before a byte is written, tensors that no pass would take."""
    try:
        written = {}
        for described in trajectory.passes:
            chosen = described["parameters"]
            masks.resolve(masks.from_plain(described["mask"]), [tensors[i] for i in chosen])
            for i in chosen:
                written[f"Parameter {trajectory.header['parameters'][i]['name']!r}"] = tensors[i]
        layouts.check_apart(written)
    except (TypeError, ValueError) as error:
        raise TrajectoryError(f"{trajectory.path} can't be replayed: {error}") from None
