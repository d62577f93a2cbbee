"""The steps of a run."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

import zokernels as zk
from zokernels.lab.errors import InputError
from zokernels.lab.runs import checkpoint, evaluate, out_of_memory
from zokernels.lab.runs.history import PARTS
from zokernels.lab.runs.state import Run
from zokernels.lab.tasks.task import Example


def train(run: Run, order: Iterator[list[Example]]) -> None:
    """Steps until all are done, the run is stopped, or a step fails.

    Args:
        run: The run, at any of its steps.
        order: Its batches from the first on.
    """
    s, before, optimizer = run.settings, run.done, run.optimizer
    schedules: list[Any] = [
        LambdaLR(o, lambda n: s.factor(n + before))
        for o in (optimizer, getattr(optimizer, "fo_optimizer", None))
        if o is not None
    ]
    if s.eps_schedule != "constant":
        falling = zk.EpsSchedule(optimizer, LambdaLR, lr_lambda=lambda n: s.eps_factor(n + before))
        schedules.append(falling)
    for step, batch in enumerate(islice(order, before, s.steps), before + 1):
        if run.processes.any(run.stopped.is_set()):
            run.stopped.set()
            return
        if evaluate.stalled(run):
            run.watcher.say(
                f"Ended after step {run.done}: {s.patience} evaluations without a better one."
            )
            return
        lr = float(schedules[0].get_last_lr()[0])
        try:
            loss, halved = out_of_memory.take_step(
                optimizer, run.scorer, run.processes.batch(batch), s.retry_oom, run.history.count
            )
        except (InputError, zk.TrajectoryError):
            raise
        # A ValueError is the engine's of a step that is too large for binary32.
        except (RuntimeError, FloatingPointError, MemoryError, ValueError) as error:
            run.failure = _why(run, error)
            return
        if halved and not run.history.halved:
            run.watcher.say(
                f"Step {step}: a batch of {len(batch)} did not fit in memory, so its forwards "
                "ran as two halves; further such steps are marked in the log."
            )
        for schedule in schedules:
            schedule.step()
        run.done = step
        record = _record(run, loss, lr, halved)
        run.history.add(record)
        run.record(record)
        timing = optimizer.timing
        run.watcher.step(step, loss, timing.total, timing.total - timing.forwards)
        if s.evaluates_after(step):
            if not optimizer.trajectory:
                checkpoint.save(run)
            evaluate.evaluate(run, whole=False)


def _why(run: Run, error: BaseException) -> str:
    if not out_of_memory.is_out(error):
        return str(error)
    s, lower = run.settings, "lower --batch-size or --max-length"
    tried = f"a batch of {s.batch_size}"
    if s.retry_oom:
        tried += ", and with halves of it, too"
    else:
        lower += ", or pass --retry-oom, which halves a batch that does not fit"
    reason = out_of_memory.first_line(error)
    return f"Step {run.done + 1} ran out of memory with {tried} ({reason}); {lower}."


def _signal(run: Run) -> dict[str, float] | None:
    """What the step's slopes were made of, with the running means."""
    signal = getattr(run.optimizer, "signal", None)
    if signal is None:
        return None
    own = asdict(signal)
    return own | run.history.running(own)


def _record(run: Run, loss: float, lr: float, halved: bool) -> dict[str, Any]:
    timing = run.optimizer.timing
    slopes = list(run.optimizer.projected_gradients)
    return {
        "step": run.done,
        "loss": loss,
        "finite": all(map(math.isfinite, (loss, *slopes))),
        "lr": lr,
        "halved": halved,
        "projected_gradients": slopes,
        "signal": _signal(run),
        "seconds": round(timing.total, 6),
        "outside_forwards": round(1 - timing.forwards / timing.total, 4),
        "parts": {part: round(getattr(timing, part), 6) for part in PARTS},
        "forwards": run.history.forwards,
        "backwards": run.history.backwards,
    }
