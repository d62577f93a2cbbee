"""The metric on a split, in batches of texts of like length, and when a run measures it."""

import math
import time
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import torch

from zokernels.lab.runs import out_of_memory
from zokernels.lab.runs.history import Mean
from zokernels.lab.runs.state import Run
from zokernels.lab.scoring import Scorer, generation
from zokernels.lab.tasks import data
from zokernels.lab.tasks.metric import F1, LOSS
from zokernels.lab.tasks.task import Example, Task


class Interrupted(Exception):
    """An evaluation was asked to stop before it had seen every example."""


def evaluate(run: Run, whole: bool) -> None:
    """Measures dev, and on the way also valid if a checkpoint will be picked by it.

    Args:
        run: The run, at any of its steps.
        whole: At a run's beginning and end: nothing is picked then.
    """
    s = run.settings
    count = s.measured if whole else s.eval_examples
    if count == 0:
        return
    try:
        _measure(run, "dev", data.part(run.splits.dev, count))
        if s.keep_best and not whole:
            found = _measure(run, "valid", data.part(run.splits.valid, count))
            best = math.nan if run.best is None else run.best[0]
            if run.task.metric.better(found.value, best):
                run.best = (found.value, run.done, run.learner.copy())
    except Interrupted:
        return


def stalled(run: Run) -> bool:
    """Whether the last ``patience`` evaluations on valid were no better than one before them."""
    patience, found = run.settings.patience, [point.value for _, point in run.history.valid]
    if patience is None or len(found) <= patience:
        return False
    return run.task.metric.best(found) < len(found) - patience


def _measure(run: Run, split: str, examples: list[Example]) -> Mean:
    s, began = run.settings, time.perf_counter()
    metric, processes = run.task.metric, run.processes
    own = processes.share(examples)
    share = accuracy(
        run.scorer,
        own,
        # Losses want the logits of every token, as training does.
        batch_size=s.batch_size if metric is LOSS else 64,
        # Several stop together, or wait for each other.
        stop=run.stopped.is_set if processes.ranks == 1 else lambda: False,
        calibrate=s.calibrate,
        retry_oom=s.retry_oom,
    ) if own else None  # fmt: skip
    found = processes.mean(share)
    getattr(run.history, split).append((run.done, found))
    record = {
        "step": run.done,
        "split": split,
        "metric": metric.name,
        "value": found.value,
        "standard_error": found.error,
        "examples": found.examples,
        "seconds": round(time.perf_counter() - began, 3),
    }
    run.record(record)
    run.watcher.say(
        f"Step {run.done}: {split} {metric.name} {metric.text(found.value, found.error)} "
        f"({found.examples:,} {run.examples}, {record['seconds']:.1f} s)."
    )
    return found


@torch.no_grad()
def accuracy(
    scorer: Scorer,
    examples: Sequence[Example],
    batch_size: int = 64,
    stop: Callable[[], bool] = lambda: False,
    calibrate: bool = False,
    retry_oom: bool = False,
) -> Mean:
    """The task's metric: the share of examples judged right, or the mean of what it is.

    Args:
        scorer: The model and its way of scoring.
        examples: At least one.
        batch_size: Examples a forward.
        stop: Asked before each batch.
        calibrate: As for `Scorer.predict`.
        retry_oom: Halve a batch that does not fit in memory, until it does.

    Raises:
        Interrupted: If ``stop`` answered true.
    """
    ordered = sorted(examples, key=lambda e: len(e.sentence))
    found: list[float] = []

    metric = scorer.task.metric

    def judge(batch: Sequence[Example]) -> list[float]:
        if metric is LOSS:
            return [float(loss) for loss in scorer.losses(scorer.collate(batch))]
        if metric.written:
            compare = generation.f1 if metric is F1 else generation.exact_match
            written = generation.answers(scorer, batch)
            return [compare(w, e.answers) for w, e in zip(written, batch, strict=True)]
        places = scorer.predict(batch, calibrate)
        return [float(_is_right(scorer.task, e, i)) for e, i in zip(batch, places, strict=True)]

    for start in range(0, len(ordered), batch_size):
        if stop():
            raise Interrupted
        batch = ordered[start : start + batch_size]
        found += out_of_memory.in_parts(judge, batch) if retry_oom else judge(batch)
    squares = sum(v * v for v in found) / len(found)
    return Mean(sum(found) / len(found), len(found), squares)


@torch.no_grad()
def predictions(
    scorer: Scorer, examples: Sequence[Example], batch_size: int, calibrate: bool = False
) -> Iterator[dict[str, Any]]:
    """What the model answers, in the examples' order: each row with its answer, in plain values.

    Where a row has a column with the name of an answer's, that of all answers is another.

    Args:
        scorer: The model and its way of scoring.
        examples: Which.
        batch_size: Examples a forward.
        calibrate: As for `Scorer.predict`.
    """
    task = scorer.task
    taken = {name for example in examples for name in _row(example)}

    def answered(example: Example, **said: Any) -> dict[str, Any]:
        return _row(example) | {_free(name, taken): value for name, value in said.items()}

    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        if task.generates:
            for example, text in zip(batch, generation.answers(scorer, batch), strict=True):
                yield answered(example, prediction=text)
            continue
        shares = scorer.judged(batch, calibrate).softmax(-1)
        for example, share in zip(batch, shares, strict=True):
            best = int(share.argmax())
            label = {"label": task.label_name(best)} if task.words else {"index": best}
            words = task.candidates(example)[best].strip()
            probability = round(float(share[best]), 4)
            yield answered(example, prediction=words, **label, probability=probability)


def _free(name: str, taken: Set[str]) -> str:
    return name if name not in taken else _free(f"predicted_{name}", taken)


def _row(example: Example) -> dict[str, Any]:
    if example.turns:
        return {"messages": [{"role": role, "content": text} for role, text in example.turns]}
    return dict(example.fields) or {"prompt": example.sentence}


def _is_right(task: Task, example: Example, place: int) -> bool:
    if not example.answers or task.choices is None:
        return place == example.label
    return task.choices(example.fields)[place] in example.answers
