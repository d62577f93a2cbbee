"""Going on with a run that was killed, interrupted or stopped by a full disk.

The trajectory brings back weights and optimizer, the log of metrics brings back the history. Where
one holds more steps than the other, those are done again, with the same bits.
"""

import json
import math
from pathlib import Path
from typing import Any

import zokernels as zk
from zokernels.lab.errors import InputError
from zokernels.lab.runs import checkpoint, folder
from zokernels.lab.runs.settings import Settings
from zokernels.lab.runs.state import Run


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
    if folder.is_finished(path):
        raise InputError(f"--resume {path}: that run is finished; see {path / folder.REPORT}.")
    return read_settings(path)


def read_settings(path: Path) -> Settings:
    """What ``config.json`` says of the run in a folder.

    Raises:
        InputError: If it is of another version of this package.
    """
    config = json.loads((path / folder.CONFIG).read_text(encoding="utf-8"))
    return Settings.of({k: v for k, v in config.items() if k != folder.MARK}, path, path)


def begin(run: Run) -> None:
    """Starts the logs, or goes on with them from the last step that is whole in all of them.

    Raises:
        InputError: If the model, the data or what was written are not those of the run.
    """
    replayable, about = run.optimizer.replayable, run.settings.plain()
    path = run.out.path / (folder.TRAJECTORY if replayable else folder.CHECKPOINT)
    if not (run.resume and path.exists()):
        run.processes.wait()
        run.out.begin(about)
        run.processes.wait()
        if replayable:
            run.optimizer.record(path, about={"settings": about, "pool": run.fingerprint})
        return
    try:
        kept = _by_trajectory(run, path) if replayable else _by_checkpoint(run, path)
    except zk.TrajectoryError as error:
        raise InputError(f"--resume {run.out.path}: {error}") from None
    # The others read what is written anew.
    run.processes.wait()
    run.out.resume(kept)
    run.watcher.say(f"Resumed after step {run.done}.")


def _by_trajectory(run: Run, path: Path) -> list[dict[str, Any]]:
    trajectory = zk.Trajectory(path)
    _same_pool(run, trajectory.header["about"].get("pool"))
    records, logged = _records(run)
    kept = _rewind(run, records, min(trajectory.end, logged))
    if run.settings.keep_best and run.history.valid:
        _replay_best(run, path)
    run.optimizer.resume(path, until=run.done)
    return kept


def _by_checkpoint(run: Run, path: Path) -> list[dict[str, Any]]:
    held = checkpoint.read(run)
    _same_pool(run, held["pool"])
    records, logged = _records(run)
    if logged < held["step"]:
        raise InputError(
            f"--resume {run.out.path}: {folder.LOG} ends at step {logged}, before the checkpoint "
            f"of step {held['step']}; remove {path.name} and resume, to begin at step 1."
        )
    kept = _rewind(run, records, held["step"])
    checkpoint.restore(run, held)
    return kept


def _same_pool(run: Run, pool: int | None) -> None:
    if pool != run.fingerprint:
        raise InputError(
            f"--resume {run.out.path}: the training examples are not those that the run began "
            "with; bring the data back, or start a new run."
        )


def _records(run: Run) -> tuple[list[dict[str, Any]], int]:
    """The log up to the first record that a kill cut short or that is out of turn; its steps."""
    found: list[dict[str, Any]] = []
    steps = 0
    try:
        text = (run.out.path / folder.LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return found, steps
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
    return found, steps


def _rewind(run: Run, records: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """Brings the history back to a step; the records of it."""
    # What was measured at this very step is measured again, since it may be incomplete.
    kept = [r for r in records if r["step"] < step or ("loss" in r and r["step"] == step)]
    for record in kept:
        run.history.add(record)
    run.started -= run.history.seconds["total"]
    run.done = step
    return kept


def _replay_best(run: Run, path: Path) -> None:
    """The weights of the step that was the best on valid, from a replay until there."""
    values = [found.value for _, found in run.history.valid]
    step, found = run.history.valid[run.task.metric.best(values)]
    if not math.isfinite(found.value):
        return
    base = run.learner.copy()
    zk.replay(run.learner.model, path, until=step)
    run.best = (found.value, step, run.learner.copy())
    run.learner.put(base)
