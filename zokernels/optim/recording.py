"""An optimizer and its log: beginning one, and going on from one after a crash."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from zokernels.distributed import Distributed
from zokernels.optim.groups import rename
from zokernels.trajectory import Recorder, Trajectory, TrajectoryError, match, play
from zokernels.trajectory.format import Moments
from zokernels.trajectory.reader import read
from zokernels.trajectory.recorder import check_recordable
from zokernels.trajectory.writer import Writer

# What of a param group may change from step to step, or grows with the steps.
_CHANGING = {
    "params", "streams", "mask", "lr", "initial_lr", "initial_eps", "step", "history", "moments",
}  # fmt: skip


class Recordable(Protocol):
    """What is asked of an optimizer whose steps are recorded."""

    param_groups: list[dict[str, Any]]
    state: Any
    model: nn.Module | None
    parallel: Distributed
    backend: str | None
    bad_steps: int
    replayable: bool

    def _check_resumable(self) -> None: ...


class Recorded:
    """What an optimizer has for its log.

    Attributes:
        trajectory: The log that each step is recorded in, after `record` or `resume`.
        replayable: For authors of rules: whether the passes of `zokernels.ops` that a step makes
            are all that it does to the weights.
    """

    trajectory: Recorder | None = None
    replayable = True
    param_groups: list[dict[str, Any]]
    state: Any
    model: nn.Module | None
    parallel: Distributed
    backend: str | None
    bad_steps: int

    def record(
        self, path: str | Path, *, about: dict[str, Any] | None = None, sync_every: float = 1.0
    ) -> Recorder:
        """Record every step from here on in a new file, a few dozen bytes each.

        `zokernels.replay` makes the weights of any step from it and the weights as they are now.
        Weights changed by anything but `step` are not in it.

        Args:
            path: The file; it may not exist.
            about: What a reader should know besides, as JSON can say it.
            sync_every: Longest time in seconds before a record is synced to the disk. A kill of
                the process loses no record, whatever this is.

        Returns:
            The recorder; ``close()`` syncs the file and ends it.

        Raises:
            TrajectoryError: If the file exists or cannot be written, or the steps could not be
                replayed from it.
        """
        self.trajectory = begin(self, path, about, sync_every)
        return self.trajectory

    @torch.no_grad()
    def resume(
        self, path: str | Path, *, until: int | None = None, sync_every: float = 1.0
    ) -> Recorder:
        """Go on from a trajectory: replay it onto the base model, and record on in it.

        The optimizer is a new one with the settings of the run, over the model that the run began
        with; the weights, states and counters are then those after the last record.

        Args:
            path: The file.
            until: Number of steps to keep; the records behind them are cut off.
            sync_every: As for `record`.

        Returns:
            The recorder.

        Raises:
            TrajectoryError: If the file is damaged or another run's; nothing is changed then.
        """
        self.trajectory = go_on(self, path, until, sync_every)
        return self.trajectory

    def _moments(self) -> Moments:
        """The running means of d², by the number of a group and of a block."""
        return tuple(
            (number, block, *moment)
            for number, group in enumerate(self.param_groups)
            for block, moment in group["moments"].items()
        )

    def _check_resumable(self) -> None:
        """Raise TrajectoryError where a rule keeps what its passes do not tell."""

    def _listening(self) -> AbstractContextManager[None]:
        """Around the passes of a step: they are noted, if there is a trajectory."""
        number = self.param_groups[0]["step"]
        return self.trajectory.listening(number) if self.trajectory else nullcontext()


def begin(
    optimizer: Recordable, path: str | Path, about: dict[str, Any] | None, sync_every: float
) -> Recorder:
    """Starts a trajectory at the optimizer's present step; see `Recorded.record`."""
    for group in optimizer.param_groups:
        check_recordable(group["mask"])
    if any(state for state in optimizer.state.values()):
        raise TrajectoryError(
            "The optimizer has made steps that left a state behind, which a replay could not make "
            "again; record from its first step."
        )
    first = optimizer.param_groups[0]
    return Recorder.create(
        path,
        _named(optimizer),
        optimizer=type(optimizer).__name__,
        groups=_constants(optimizer),
        seed=first["seed"],
        first=first["step"],
        replayable=optimizer.replayable,
        about=about,
        sync_every=sync_every,
        on_disk=_by_first(optimizer),
    )


def go_on(
    optimizer: Recordable, path: str | Path, until: int | None, sync_every: float
) -> Recorder:
    """Replays a trajectory onto a new optimizer; see `Recorded.resume`."""
    optimizer._check_resumable()
    # One process reads and writes the file: others may not see it, or may see it half cut.
    trajectory = Trajectory(path, optimizer.parallel.from_first(lambda: read(path)))
    until = trajectory.until(until)
    _check_same_run(optimizer, trajectory)
    named = _named(optimizer)
    order = [p["name"] for p in trajectory.header["parameters"]]
    by_name = {name: (name, p, stream) for name, p, stream in named}
    model = optimizer.model
    tensors = match(trajectory, [p for _, p, _ in named] if model is None else model)
    ordered = [by_name[n] for n in order]
    recorder = Recorder.reopen(trajectory, until, ordered, sync_every, _by_first(optimizer))
    states: dict[int, dict[str, torch.Tensor]] = {}
    play(trajectory, tensors, until, states, backend=optimizer.backend)
    for place, state in states.items():
        optimizer.state[tensors[place]].update(state)
    steps = trajectory.steps[: until - trajectory.header["first"]]
    for step in steps:
        for scalars in step.passes or ():
            if scalars.count is not None:
                for i in trajectory.passes[scalars.of]["parameters"]:
                    optimizer.state[tensors[i]]["step"] = scalars.count
        for number, block, *moment in step.moments:
            own = optimizer.param_groups[number]
            own["moments"] = {**own["moments"], block: moment}
    for group in optimizer.param_groups:
        group["step"] = until
    optimizer.bad_steps = 0
    while optimizer.bad_steps < len(steps) and steps[-1 - optimizer.bad_steps].passes is None:
        optimizer.bad_steps += 1
    return recorder


def _by_first(optimizer: Recordable) -> Callable[[Callable[[], Writer]], Writer | None]:
    """Opens a file in the first of several processes; what it raises, all of them raise."""

    def on_disk(open_file: Callable[[], Writer]) -> Writer | None:
        opened: list[Writer] = []
        optimizer.parallel.from_first(lambda: opened.append(open_file()))
        return opened[0] if opened else None

    return on_disk


def _named(optimizer: Recordable) -> list[tuple[str, torch.Tensor, int]]:
    """Every parameter of the module, or of the groups: (name, parameter, stream)."""
    pairs = [
        pair for g in optimizer.param_groups for pair in zip(g["params"], g["streams"], strict=True)
    ]
    if optimizer.model is not None:
        # What joined the optimizer later has a stream of its own, and not its place.
        own = {id(p): stream for p, stream in pairs}
        named = enumerate(optimizer.model.named_parameters())
        return [(n, p, own.get(id(p), i)) for i, (n, p) in named]
    return [(str(i), p, stream) for i, (p, stream) in enumerate(pairs)]


def _constants(optimizer: Recordable) -> list[dict[str, Any]]:
    """The numbers of each group that stay as they are, as JSON gives them back."""
    plain = [
        {
            k: v
            for k, v in g.items()
            if k not in _CHANGING and isinstance(v, bool | int | float | str | tuple | None)
        }
        for g in optimizer.param_groups
    ]
    for own, g in zip(plain, optimizer.param_groups, strict=True):
        # Where a schedule moves it, what it began with.
        own["eps"] = g.get("initial_eps", g["eps"])
        if g["blocks"] is not None:
            own["blocks"] = zlib.crc32(str(g["blocks"]).encode())
    return json.loads(json.dumps(plain))


def _check_same_run(optimizer: Recordable, trajectory: Trajectory) -> None:
    header, name = trajectory.header, type(optimizer).__name__
    if header["optimizer"] != name:
        raise TrajectoryError(
            f"{trajectory.path} was recorded by {header['optimizer']}, but this is {name}; "
            "make the same optimizer."
        )
    if any(state for state in optimizer.state.values()):
        raise TrajectoryError(
            "The optimizer has made steps already; resume with a new one and the base model."
        )
    now = _constants(optimizer)
    if len(now) != len(header["groups"]):
        raise TrajectoryError(
            f"{trajectory.path} was recorded with {len(header['groups'])} param groups, but the "
            f"optimizer has {len(now)}; make the same groups."
        )
    for here, group in zip(now, header["groups"], strict=True):
        rename(there := dict(group))
        for key in sorted({*here, *there}):
            # A log of before says nothing of its blocks.
            if key == "blocks" and key not in there:
                continue
            if here.get(key) != there.get(key):
                raise TrajectoryError(
                    f"{key} is {here.get(key)!r}, but it was {there.get(key)!r} when "
                    f"{trajectory.path} was begun; make the optimizer with the same settings."
                )
