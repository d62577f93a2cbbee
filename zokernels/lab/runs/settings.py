"""What a run is told: its settings, each with what it means and what it may be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zokernels import noise
from zokernels.estimators import ESTIMATORS, NORMALIZE
from zokernels.lab.errors import InputError
from zokernels.lab.models import packages, quantised
from zokernels.lab.models.loading import DTYPES
from zokernels.lab.models.schemes import ADAPTERS, SCHEMES
from zokernels.lab.runs.limits import Count, CountOrAll, Limit, OneOf, Rate, Scale, Share
from zokernels.lab.runs.optimizers import OPTIMIZERS
from zokernels.lab.scoring import NEW_TOKENS, OBJECTIVES
from zokernels.lab.tasks import COMPLETION, SST2, TASKS, Task, description, get_task
from zokernels.lab.tasks.metric import METRICS

# In place of a learning rate: the one that a probe advises; of a device: a GPU where there is one.
AUTO = "auto"
# A setting's metadata: what it means, the part of the help that it is in, and its `Limit` if any.
HELP, PANEL, LIMIT = "help", "panel", "limit"


def _setting(panel: str, default: Any, text: str, limit: Limit | None = None) -> Any:
    return field(default=default, metadata={HELP: text, PANEL: panel, LIMIT: limit})


_data: Callable[..., Any] = partial(_setting, "Data")
_model: Callable[..., Any] = partial(_setting, "Model")
_method: Callable[..., Any] = partial(_setting, "Method")
_run: Callable[..., Any] = partial(_setting, "Run")
_SCHEDULE = OneOf(("constant", "linear", "cosine"))
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(kw_only=True)
class Settings:
    """Everything that a run depends on; those with a help are options of the same names.

    ``lr="auto"`` sets ``auto_lr``: before its first step the run probes, and puts the rate that it
    took into ``lr``, and into ``tuned`` what it went by.
    """

    model: str = _model(MISSING, "Folder made by save_pretrained, GGUF file, or hub name.")
    scheme: str = _model("full", f"What is trained: {', '.join(SCHEMES)}.", OneOf(SCHEMES))
    train_only: str | None = _model(None, "Regular expression over parameter names.")
    lora_rank: int = _model(8, "Rank of --scheme lora.", Count(1))
    lora_alpha: float = _model(16.0, "Scale of LoRA's update, times the rank.", Scale())
    lora_targets: str | None = _model(
        None,
        "Layers of LoRA: ends of names, with commas; all-linear; or a regular expression over "
        "names. Without it queries and values.",
    )
    lora_dropout: float = _model(
        0.0, "Before LoRA, with --optimizer fo-adam or fo-sgd.", Share(with_zero=True)
    )
    load_in: str | None = _model(
        None,
        "Quantise the frozen base by bitsandbytes: 8bit, or 4bit (nf4).",
        OneOf((None, *quantised.KINDS)),
    )
    dtype: str = _model(
        "float32", "float32, bfloat16 or float16; or fp32, bf16, fp16.", OneOf(tuple(DTYPES))
    )
    name: str | None = None

    task: str = _data(
        None,
        f"Task: {', '.join(TASKS)}; or a .yaml file that describes one. Without it sst2, and "
        "with a file as --data completion.",
    )
    described: dict[str, Any] | None = None
    data: str | None = _data(
        None,
        "File, folder or data set (NAME:CONFIG@SPLIT) with the data; else ZOKERNELS_DATA, hub, "
        "shipped.",
    )
    eval_data: str | None = _data(None, "File or data set to report on.")
    columns: str | None = _data(None, "Columns of the data by the task's names: NAME=COLUMN,...")
    metric: str | None = _data(
        None, f"What is reported: {', '.join(METRICS)}.", OneOf((None, *METRICS))
    )
    max_new_tokens: int = _data(NEW_TOKENS, "Longest answer that is written, in tokens.", Count(1))
    template: bool = _data(True, "Words around the texts.")
    chat: bool = _data(False, "Prompts as turns of a chat.")
    shots: int | None = _data(None, "Training examples of each label.", Count(1))
    demos: int = _data(0, "Solved examples before each prompt.", Count(0))
    calibrate: bool = _data(False, "Judge against a prompt without content.")
    min_words: int | None = _data(None, "Shortest training sentence.", Count(0))
    max_words: int | None = _data(None, "Longest training sentence.", Count(1))
    max_length: int = _data(256, "Longest row in tokens.", Count(8))
    balanced: bool = _data(False, "Batches with equal class counts.")

    optimizer: str = _method("zosgd", f"Optimizer: {', '.join(OPTIMIZERS)}.")
    objective: str | None = _method(
        None, f"What is lowered: {', '.join(OBJECTIVES)}.", OneOf((None, *OBJECTIVES))
    )
    steps: int = _method(1000, "Optimizer steps; 0: evaluate only.", Count(0))
    batch_size: int = _method(16, "Sentences a step.", Count(1))
    lr: float = _method(1e-6, f"Learning rate, or {AUTO}: by a probe.", Rate())
    auto_lr: bool = False
    probe_forwards: int = _method(800, "Forwards of the probe of --lr auto, at most.", Count(1))
    tuned: dict[str, Any] | None = None
    schedule: str = _method("constant", "constant, linear or cosine, to 0.", _SCHEDULE)
    warmup: int = _method(0, "Steps in which the rate rises linearly to --lr.", Count(0))
    weight_decay: float = _method(0.0, "Decoupled weight decay.", Rate())
    eps: float = _method(1e-3, "Scale of the perturbation.", Scale())
    eps_schedule: str = _method("constant", "constant, linear or cosine, to --eps-end.", _SCHEDULE)
    eps_end: float | None = _method(None, "Scale of the last step.", Scale())
    num_queries: int = _method(1, "Directions a step.", Count(1))
    estimator: str = _method(
        "two_sided",
        f"What a direction is compared with: {', '.join(ESTIMATORS)}.",
        OneOf(ESTIMATORS),
    )
    normalize: str | None = _method(
        None,
        "Divide a step by the deviation of its slopes, std, or their root, ema.",
        OneOf(NORMALIZE),
    )
    clip: float | None = _method(None, "Cut slopes at so many of their root.", Scale())
    dist: str = _method("gaussian", "gaussian, rademacher or rank1.", OneOf(tuple(noise.KINDS)))
    sparsity: float | None = _method(None, "Share of the weights left alone.", Share())
    resample_every: int | None = _method(None, "Steps between draws of the sparse mask.", Count(1))
    blocks: str | None = _method(
        None, "Perturb block by block: layer or module.", OneOf((None, "layer", "module"))
    )
    block_order: str = _method(
        "sequential",
        "sequential (update at once) or simultaneous.",
        OneOf(("sequential", "simultaneous")),
    )
    hybrid_split: int | None = _method(
        None, "Layers by zeroth order, with --optimizer hybrid.", Count(0)
    )
    fo_lr: float | None = _method(None, "Learning rate of the other layers of hybrid.", Rate())
    fo_optimizer: str = _method(
        "fo-adam", "Optimizer of the other layers of hybrid: fo-sgd, fo-adam."
    )
    rounding: str = _method("nearest", "nearest or stochastic.", OneOf(("nearest", "stochastic")))
    seed: int = _method(0, "Fixes data order and directions.", Count(0))
    perturb: str | None = _method(
        None,
        "on_entry, paired or in_place.",
        OneOf((None, "on_entry", "paired", "in_place")),
    )
    points: int | str = _method(
        2, "Points of a forward with --perturb paired: a number, or all.", CountOrAll(2)
    )
    parallel: str | None = _method(
        None,
        "What several processes share: data (the batch), query (the directions), or D,Q of both.",
    )
    shard: bool = _method(False, "Cut the weights over several processes (FSDP2).")
    backend: str | None = _method(None, "Kernels to use; see zokernels env.")

    out: Path = _run(MISSING, "Run folder; without it runs/TASK-TIME.")
    overwrite: bool = _run(False, "Replace an earlier run in --out.")
    eval_every: int = _run(0, "Steps between evaluations; 0: none.", Count(0))
    eval_examples: int | None = _run(None, "Examples of an evaluation; 0: none at all.", Count(0))
    whole_dev: bool = _run(
        False, "Measure all of dev at the beginning and the end, whatever --eval-examples says."
    )
    keep_best: bool = _run(False, "Keep the step best on held-out training examples.")
    patience: int | None = _run(
        None, "With --keep-best, end after so many evaluations without a better one.", Count(1)
    )
    save_weights: bool = _run(True, "Keep the weights, or only the log that makes them again.")
    merge: bool = _run(False, "Also save the model with its LoRA merged.")
    push_to_hub: str | None = _run(None, "OWNER/NAME on the hub, to which the result goes.")
    private: bool = _run(True, "Make that a private repository.")
    report_to: str | None = _run(
        None, "Trackers of accelerate, with commas: tensorboard, wandb, mlflow, trackio, ..."
    )
    retry_oom: bool = _run(False, "Run a batch that memory does not hold in two halves.")
    device: str = _run(AUTO, f"Where to run; {AUTO}: on a GPU where torch sees one.")

    def __post_init__(self) -> None:
        if isinstance(self.points, str) and self.points.isdecimal():
            self.points = int(self.points)
        self.dtype = _SHORT.get(self.dtype, self.dtype)
        if self.lr == AUTO:
            self.lr, self.auto_lr = 0.0, True
        if self.device == AUTO:
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.task is None:
            own = self.data is not None and not Path(self.data).is_dir()
            self.task = (COMPLETION if own else SST2).name

    @classmethod
    def of(cls, plain: dict[str, Any], source: Path, out: Path) -> Settings:
        """Settings from the plain values that a run keeps, with another ``out``.

        Raises:
            InputError: If they are of another version of this package.
        """
        if unknown := set(plain) - {f.name for f in fields(cls)}:
            raise InputError(
                f"{source} has a setting {min(unknown)!r} that this version of zokernels does not "
                "have; use the version that began the run."
            )
        return cls(**{**plain, "out": out})

    def plain(self) -> dict[str, Any]:
        """All of them as JSON can hold them."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}

    def the_task(self) -> Task:
        """The task that they name, as its description was when it was first read.

        Raises:
            InputError: If there is none.
        """
        if self.described is None and self.task.endswith(description.ENDINGS):
            self.described = description.read(Path(self.task))
        task = get_task(self.task, self.described)
        return task.with_template(self.template).measured_by(self.metric)

    @property
    def title(self) -> str:
        """The model's name in reports: ``name``, or the end of where it came from."""
        if self.model.startswith(packages.PREFIX):
            package, _, _ = self.model.removeprefix(packages.PREFIX).partition("/")
            return self.name or package
        return self.name or Path(self.model).name

    @property
    def loses_updates(self) -> bool:
        """Whether trained weights round small updates away."""
        short = self.dtype != "float32" and self.scheme not in ADAPTERS
        return short and self.rounding == "nearest"

    @property
    def measured(self) -> int | None:
        """How many examples an evaluation at a run's beginning and end has; None: all of dev."""
        return None if self.whole_dev and self.eval_examples != 0 else self.eval_examples

    def evaluates_after(self, step: int) -> bool:
        """Whether a step during training is followed by an evaluation."""
        return self.eval_every > 0 and step % self.eval_every == 0 and step < self.steps

    def factor(self, step: int) -> float:
        """The share of the learning rate in use at a step, counted from 0."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return _left(self.schedule, step - self.warmup, self.steps - self.warmup)

    def eps_factor(self, step: int) -> float:
        """The share of ε in use at a step, counted from 0."""
        last = 1.0 if self.eps_end is None else self.eps_end / self.eps
        return last + (1 - last) * _left(self.eps_schedule, step, self.steps)


def _left(schedule: str, step: int, steps: int) -> float:
    """How much of its way a schedule has before it."""
    if schedule == "linear":
        return 1 - step / steps
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / steps))
    return 1.0


def described() -> list[Field[Any]]:
    """The settings that are options of a command."""
    return [f for f in fields(Settings) if HELP in f.metadata]


def option(name: str) -> str:
    """The command's option for a setting."""
    return f"--{name.replace('_', '-')}"
