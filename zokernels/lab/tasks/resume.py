"""Going on with a run that was killed, interrupted or stopped by a full disk.

The trajectory brings back weights and optimizer, the log of metrics brings back the history. Where
one holds more steps than the other, those are done again, with the same bits.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zokernels as zk
from zokernels.lab.tasks import evaluate, folder
from zokernels.lab.tasks.errors import InputError
from zokernels.lab.tasks.settings import Settings

if TYPE_CHECKING:
    from zokernels.lab.tasks.run import Finetune


def settings_of(path: Path) -> Settings:
    """The settings of the run in a folder that is to go on.

    Raises:
        InputError: If there is no run, or it is finished.
    """
    if not folder.is_run(path):
        raise InputError(
            f"--resume {path} is not a run folder, or the run ended before it wrote anything; "
            "name the --out of a run, or start it again."
        )
    try:
        metrics = json.loads((path / folder.METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        metrics = {"interrupted": True}
    if not (metrics.get("interrupted") or metrics.get("failure")):
        raise InputError(f"--resume {path}: that run is finished; see {path / folder.REPORT}.")
    return read_settings(path)


def read_settings(path: Path) -> Settings:
    """What ``config.json`` says of the run in a folder.

    Raises:
        InputError: If it is of another version of this package.
    """
    config = json.loads((path / folder.CONFIG).read_text(encoding="utf-8"))
    return to_settings({k: v for k, v in config.items() if k != folder.MARK}, path, path)


def to_settings(plain: dict[str, Any], source: Path, out: Path) -> Settings:
    """Settings from the plain values that a run keeps, with another ``out``.

    Raises:
        InputError: If they are of another version of this package.
    """
    if unknown := set(plain) - {f.name for f in fields(Settings)}:
        raise InputError(
            f"{source} has a setting {min(unknown)!r} that this version of zokernels does not "
            "have; use the version that began the run."
        )
    return Settings(**{**plain, "out": out})


def other_data(path: Path) -> str:
    """The sentence for a run whose training examples are not what they were."""
    return (
        f"--resume {path}: the training examples are not those that the run began with; bring the "
        "data back, or start a new run."
    )


def fingerprint(pool: Sequence[Any]) -> int:
    """A checksum of the training examples, in their order."""
    return zlib.crc32("\n".join(map(repr, pool)).encode())


def restore(run: Finetune, optimizer: Any, out: folder.RunFolder, about: dict[str, Any]) -> int:
    """Brings a run to its last step that is whole in both logs, and returns its number.

    Args:
        run: The run, with the base model loaded.
        optimizer: Its new optimizer.
        out: The run's folder.
        about: What the trajectory's header must say about the run.

    Raises:
        InputError: If the model, the data or the trajectory are not those of the run.
    """
    path = out.path / folder.TRAJECTORY
    try:
        trajectory = zk.Trajectory(path)
        if trajectory.header["about"].get("pool") != about["pool"]:
            raise InputError(other_data(out.path))
        lines = whole_lines(out.path / folder.LOG)
        logged = [r for r in lines if "loss" in r]
        step = min(trajectory.end, len(logged))
        # What was measured at this very step is measured again, since it may be incomplete.
        kept = [r for r in lines if r["step"] < step or ("loss" in r and r["step"] == step)]
        restore_history(run, kept)
        _restore_best(run, kept, path)
        optimizer.resume(path, until=step)
    except zk.TrajectoryError as error:
        raise InputError(f"--resume {out.path}: {error}") from None
    out.resume(kept)
    run.watcher.say(f"Resumed after step {step}.")
    return step


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The log's records, up to the first that a kill cut short or that is out of turn."""
    found: list[dict[str, Any]] = []
    steps = 0
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return found
    for line in text.split("\n")[:-1]:
        try:
            record = json.loads(line)
            if "loss" in record:
                if record["step"] != steps + 1:
                    break
                steps += 1
            found.append(record)
        except (ValueError, TypeError, KeyError):
            break
    return found


def restore_history(run: Finetune, records: list[dict[str, Any]]) -> None:
    """Brings back what was measured, for the plot and the report."""
    history = run.history
    for r in records:
        if "loss" in r:
            history.losses.append(math.nan if r["loss"] is None else r["loss"])
            history.halved += r.get("halved", False)
            for part, seconds in r["parts"].items():
                history.seconds[part] += seconds
            history.seconds["total"] += r["seconds"]
            history.forwards = r.get("forwards", 0)
            history.backwards = r.get("backwards", 0)
        else:
            found = evaluate.Accuracy(r["accuracy"], r["examples"])
            getattr(history, r["split"]).append((r["step"], found))
    run.earlier = history.seconds["total"]


def _restore_best(run: Finetune, records: list[dict[str, Any]], path: Path) -> None:
    """The weights of the step that was the best on valid, from a replay until there."""
    if not run.settings.keep_best or not run.history.valid:
        return
    step, found = max(run.history.valid, key=lambda point: point[1].value)
    base = [p.detach().clone() for p in run.trainable()]
    zk.replay(run.model, path, until=step)
    run.best = (found.value, step, [p.detach().clone() for p in run.trainable()])
    for p, start in zip(run.trainable(), base, strict=True):
        p.data.copy_(start)
