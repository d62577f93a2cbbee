"""What a run left, or any model or adapter, ready to be asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import zokernels as zk
from zokernels.lab import files
from zokernels.lab.errors import InputError
from zokernels.lab.models import probe, schemes, soft
from zokernels.lab.runs import folder, learner, prepare
from zokernels.lab.runs.history import Watcher
from zokernels.lab.runs.learner import Learner
from zokernels.lab.runs.resume import read_settings
from zokernels.lab.runs.settings import Settings
from zokernels.lab.runs.state import Run
from zokernels.lab.tasks import data
from zokernels.lab.tasks.data import Splits
from zokernels.lab.tasks.task import Example

_ADAPTER = "adapter_config.json"


def settings_of(model: str, given: dict[str, Any]) -> Settings:
    """The settings of a run in a folder, or those of a model or adapter.

    Args:
        model: A run folder, an adapter's folder, or what `loading.load` takes.
        given: Settings that are to be others.
    """
    path = Path(model)
    if not folder.is_run(path):
        return Settings(model=model, out=path, **given)
    own = read_settings(path)
    if "task" in given:
        own.described = None
    if "eval_examples" in given:
        own.whole_dev = False
    plain = {**own.plain(), **given, "out": path}
    # An auto rate was found, and is a number.
    return Settings(**plain)


def opened(s: Settings, examples: list[Example] | None, watcher: Watcher) -> Run:
    """A run whose model is the one that was saved, and which can be asked.

    Args:
        s: Of `settings_of`.
        examples: What it is asked about; None: the dev split of its data.
        watcher: Is told what is worth knowing.

    Raises:
        InputError: If the model or the data can't be had.
    """
    run = Run(s, watcher)
    run.task = s.the_task()
    if examples is None or s.demos:
        run.splits = data.load(run.task, s.data, s.eval_data, data.parsed(s.columns))
    if examples is not None:
        run.splits = (
            replace(run.splits, dev=examples)
            if s.demos
            else Splits([], [], examples, "what is given")
        )
    run.learner = _learner(s)
    run.scorer = prepare.scorer(run)
    return run


def _learner(s: Settings) -> Learner:
    run = s.out if folder.is_run(s.out) else None
    weights = Path(s.model) if run is None else run / folder.WEIGHTS
    if run is not None and not weights.is_dir():
        return _replayed(s, run)
    if (weights / _ADAPTER).is_file():
        held = files.read_json(weights / _ADAPTER) or {}
        base = s.model if run is not None else held.get("base_model_name_or_path")
        if not base:
            raise InputError(f"{weights / _ADAPTER} does not name its base model; add it there.")
        return _adapted(replace(s, model=base), weights)
    if (weights / probe.WEIGHTS).is_file():
        if run is None:
            raise InputError(f"{weights} is a probe; name the folder of the run that made it.")
        made = learner.load(s)
        made.model.load_pretrained(weights)
        return made
    return learner.load(
        replace(s, model=str(weights), scheme="full", train_only=None) if run else s
    )


def _adapted(s: Settings, weights: Path) -> Learner:
    peft = soft.import_peft("lora")
    plain = learner.load(replace(s, scheme="full", train_only=None, lora_targets=None))
    try:
        model = peft.PeftModel.from_pretrained(plain.model, str(weights)).eval()
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"The adapter {weights} does not fit {s.model}: {reason}") from None
    count = sum(p.numel() for p in model.parameters())
    return Learner(model, plain.loaded, schemes.Trained(0, count))


def _replayed(s: Settings, run: Path) -> Learner:
    """Of a run that kept no weights those that its log gives."""
    path = run / folder.TRAJECTORY
    if not path.exists():
        raise InputError(f"{run} has neither weights in {folder.WEIGHTS} nor a log of its steps.")
    made = learner.load(s)
    try:
        until = (files.read_json(run / folder.METRICS) or {}).get("weights_of_step")
        trajectory = zk.Trajectory(path)
        zk.replay(made.model, path, trajectory.until(until))
    except (ValueError, RuntimeError) as error:
        raise InputError(str(error)) from None
    return made
