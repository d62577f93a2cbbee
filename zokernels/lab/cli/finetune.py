"""``zokernels finetune``: a task, a model, and an optimizer."""

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from zokernels.estimators import ESTIMATORS
from zokernels.lab.cli import presets
from zokernels.lab.tasks import TASKS, InputError, folder, get_task
from zokernels.lab.tasks.models import quiet
from zokernels.lab.tasks.optimizers import OPTIMIZERS
from zokernels.lab.tasks.presets import get
from zokernels.lab.tasks.resume import settings_of
from zokernels.lab.tasks.run import Finetune
from zokernels.lab.tasks.schemes import SCHEMES
from zokernels.lab.tasks.scoring import OBJECTIVES
from zokernels.lab.tasks.settings import AUTO, Settings

_DATA, _MODEL, _METHOD, _RUN = "Data", "Model", "Method", "Run"


def _option(text: str, panel: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


def _rate(text: str) -> float | str:
    """A learning rate as the command line has it."""
    try:
        return AUTO if text == AUTO else float(text)
    except ValueError:
        raise typer.BadParameter(f"'{text}' is neither a number nor {AUTO}.") from None


def command(
    context: typer.Context,
    model: Annotated[
        str | None, _option("Folder made by save_pretrained, GGUF file, or hub name.", _MODEL)
    ] = None,
    preset: Annotated[
        str | None,
        _option("Settings of the benchmark paper, by name, or list; other options win.", _METHOD),
    ] = None,
    task: Annotated[str, _option(f"Task: {', '.join(TASKS)}.", _DATA)] = "sst2",
    template: Annotated[
        bool, _option("Words around the texts.", _DATA, "--template/--no-template")
    ] = True,
    chat: Annotated[bool, _option("Prompts as turns of a chat.", _DATA)] = False,
    shots: Annotated[int | None, _option("Training examples of each label.", _DATA)] = None,
    demos: Annotated[int, _option("Solved examples before each prompt.", _DATA)] = 0,
    calibrate: Annotated[bool, _option("Judge against a prompt without content.", _DATA)] = False,
    objective: Annotated[
        str | None, _option(f"What is lowered: {', '.join(OBJECTIVES)}.", _METHOD)
    ] = None,
    data: Annotated[
        str | None, _option("Folder with the data; else ZOKERNELS_DATA, hub, shipped.", _DATA)
    ] = None,
    out: Annotated[Path | None, _option("Run folder [runs/TASK-TIME].", _RUN)] = None,
    steps: Annotated[int, _option("Optimizer steps.", _METHOD)] = 1000,
    batch_size: Annotated[int, _option("Sentences a step.", _METHOD)] = 16,
    optimizer: Annotated[str, _option(f"Optimizer: {', '.join(OPTIMIZERS)}.", _METHOD)] = "zosgd",
    lr: Annotated[
        Any, _option("Learning rate, or auto: by a probe.", _METHOD, parser=_rate, metavar="RATE")
    ] = 1e-6,
    probe_forwards: Annotated[
        int, _option("Forwards of the probe of --lr auto, at most.", _METHOD)
    ] = 800,
    schedule: Annotated[str, _option("constant, linear or cosine, to 0.", _METHOD)] = "constant",
    eps: Annotated[float, _option("Scale of the perturbation.", _METHOD)] = 1e-3,
    eps_schedule: Annotated[
        str, _option("constant, linear or cosine, to --eps-end.", _METHOD)
    ] = "constant",
    eps_end: Annotated[float | None, _option("Scale of the last step.", _METHOD)] = None,
    num_queries: Annotated[int, _option("Directions a step.", _METHOD)] = 1,
    estimator: Annotated[
        str, _option(f"What a direction is compared with: {', '.join(ESTIMATORS)}.", _METHOD)
    ] = "two_sided",
    normalize: Annotated[
        str | None,
        _option("Divide a step by the deviation of its slopes, std, or their root, ema.", _METHOD),
    ] = None,
    clip: Annotated[float | None, _option("Cut slopes at so many of their root.", _METHOD)] = None,
    dist: Annotated[str, _option("gaussian, rademacher or rank1.", _METHOD)] = "gaussian",
    scheme: Annotated[str, _option(f"What is trained: {', '.join(SCHEMES)}.", _MODEL)] = "full",
    train_only: Annotated[
        str | None, _option("Regular expression over parameter names.", _MODEL)
    ] = None,
    sparsity: Annotated[float | None, _option("Share of the weights left alone.", _METHOD)] = None,
    resample_every: Annotated[
        int | None, _option("Steps between draws of the sparse mask.", _METHOD)
    ] = None,
    blocks: Annotated[
        str | None, _option("Perturb block by block: layer or module.", _METHOD)
    ] = None,
    block_order: Annotated[
        str, _option("sequential (update at once) or simultaneous.", _METHOD)
    ] = "sequential",
    hybrid_split: Annotated[
        int | None, _option("Layers by zeroth order, with --optimizer hybrid.", _METHOD)
    ] = None,
    fo_lr: Annotated[
        float | None, _option("Learning rate of the other layers of hybrid.", _METHOD)
    ] = None,
    fo_optimizer: Annotated[
        str, _option("Optimizer of the other layers of hybrid: fo-sgd, fo-adam.", _METHOD)
    ] = "fo-adam",
    weight_decay: Annotated[float, _option("Decoupled weight decay.", _METHOD)] = 0.0,
    rounding: Annotated[str, _option("nearest or stochastic.", _METHOD)] = "nearest",
    seed: Annotated[int, _option("Fixes data order and directions.", _METHOD)] = 0,
    eval_every: Annotated[int, _option("Steps between evaluations; 0: none.", _RUN)] = 0,
    eval_examples: Annotated[
        int | None, _option("Sentences of an evaluation during training.", _RUN)
    ] = None,
    keep_best: Annotated[
        bool, _option("Keep the step best on held-out training sentences.", _RUN)
    ] = False,
    save_weights: Annotated[
        bool, _option("Keep the weights, or only the log that makes them again.", _RUN)
    ] = True,
    dtype: Annotated[str, _option("float32, bfloat16 or float16.", _MODEL)] = "float32",
    perturb: Annotated[str | None, _option("on_entry, paired or in_place.", _METHOD)] = None,
    points: Annotated[
        str, _option("Points of a forward with --perturb paired: a number, or all.", _METHOD)
    ] = "2",
    backend: Annotated[str | None, _option("Kernels to use; see zokernels env.", _METHOD)] = None,
    min_words: Annotated[int | None, _option("Shortest training sentence.", _DATA)] = None,
    max_words: Annotated[int | None, _option("Longest training sentence.", _DATA)] = None,
    max_length: Annotated[int, _option("Longest row in tokens.", _DATA)] = 256,
    balanced: Annotated[bool, _option("Batches with equal class counts.", _DATA)] = False,
    retry_oom: Annotated[
        bool, _option("Run a batch that memory does not hold in two halves.", _RUN, "--retry-oom")
    ] = False,
    device: Annotated[str, _option("Where to run.", _RUN)] = "cpu",
    json: Annotated[Path | None, _option("Also write the metrics to this file.", _RUN)] = None,
    overwrite: Annotated[bool, _option("Replace an earlier run in --out.", _RUN)] = False,
    resume: Annotated[
        Path | None, _option("Go on with the run in this folder; it has all settings.", _RUN)
    ] = None,
) -> int:
    """Fine-tune a model on a task by forward passes and write a run folder."""
    options = dict(locals())
    path = options.pop("json")
    folder.check_json(path)
    for name in ("context", "resume"):
        del options[name]
    if resume is not None:
        _check_alone(context)
        return _report(train(settings_of(resume), _words(), resume=True), path)
    if preset == "list":
        return presets.show()
    options = with_preset(context, options)
    options["out"] = out or Path("runs") / f"{options['task']}-{time.strftime('%Y%m%d-%H%M%S')}"
    return _report(train(Settings(**options), _words()), path)


def with_preset(context: typer.Context, options: dict[str, Any]) -> dict[str, Any]:
    """The options as settings: with those of the preset that they name, where none is given.

    Raises:
        InputError: If there is no such preset or task, or no model.
    """
    settings = dict(options)
    if (preset := settings.pop("preset")) is not None:
        given = {name for name in settings if _is_given(context, name)}
        settings |= {k: v for k, v in get(preset).settings.items() if k not in given}
    if settings["model"] is None:
        raise InputError(
            "--model is missing: name a folder made by save_pretrained, a file in GGUF form, or a "
            "model on the hub."
        )
    get_task(settings["task"])
    return settings


def _report(metrics: dict[str, Any], path: Path | None) -> int:
    if path is not None:
        folder.write_answer(path, metrics)
    return 130 if metrics["interrupted"] else 0


def _words() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _check_alone(context: typer.Context) -> None:
    """Refuses options beside --resume that would change the run."""
    for name in context.params:
        if name not in ("resume", "json") and _is_given(context, name):
            raise InputError(
                f"--resume takes every setting from the run's folder; leave out "
                f"--{name.replace('_', '-')}."
            )


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def train(settings: Settings, command_line: str = "", resume: bool = False) -> dict[str, Any]:
    """Runs the settings under a progress bar, says how it ended, and returns the metrics."""
    # rich's live display takes a moment to load, and `--help` needs none of it.
    from zokernels.lab.cli.progress import ProgressWatcher

    settings.check()
    quiet()
    with ProgressWatcher(settings.steps) as watcher:
        metrics = Finetune(settings, watcher, command_line, resume).run()
        where = f"{settings.out}/{folder.REPORT}"
        if metrics["interrupted"]:
            weights = f"their weights are in {settings.out}/{folder.WEIGHTS}, the report in"
            watcher.say(
                f"Interrupted after {metrics['steps']} steps; "
                f"{weights if settings.save_weights else 'the report is in'} {where}."
            )
        else:
            watcher.say(ending(metrics, where))
        if metrics["diverged"]:
            watcher.say(metrics["diverged"])
    return metrics


def ending(metrics: dict[str, Any], where: str) -> str:
    """The line that a finished run ends with."""
    before, after = metrics["dev_accuracy_before"], metrics["dev_accuracy_after"]
    return (
        f"dev {metrics['metric']} {before:.1%} -> {after:.1%} ({metrics['data']}, "
        f"{metrics['steps']} steps, {metrics['seconds']:.0f} s): {where}"
    )
