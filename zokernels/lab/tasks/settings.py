"""What a run is told, and which of it is refused."""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from zokernels import noise
from zokernels.estimators import ESTIMATORS, NORMALIZE
from zokernels.lab.tasks import packages
from zokernels.lab.tasks.errors import InputError
from zokernels.lab.tasks.models import DTYPES
from zokernels.lab.tasks.schemes import ADAPTERS, SCHEMES
from zokernels.lab.tasks.scoring import OBJECTIVES

SCHEDULES = ("constant", "linear", "cosine")
CHOICES = {
    "schedule": SCHEDULES,
    "eps_schedule": SCHEDULES,
    "estimator": ESTIMATORS,
    "normalize": NORMALIZE,
    "dist": tuple(noise.KINDS),
    "blocks": (None, "layer", "module"),
    "block_order": ("sequential", "simultaneous"),
    "scheme": SCHEMES,
    "objective": (None, *OBJECTIVES),
    "dtype": tuple(DTYPES),
    "rounding": ("nearest", "stochastic"),
    "perturb": (None, "on_entry", "paired", "in_place"),
}
_AT_LEAST = {
    "steps": 1,
    "batch_size": 1,
    "num_queries": 1,
    "resample_every": 1,
    "max_length": 8,
    "eval_every": 0,
    "eval_examples": 1,
    "hybrid_split": 0,
    "seed": 0,
    "shots": 1,
    "demos": 0,
    "min_words": 0,
    "max_words": 1,
    "probe_forwards": 1,
}
# In place of a learning rate: the one that a probe advises.
AUTO = "auto"
# What a counter of 64 bits holds, and a pass in binary32.
_MOST, _LARGEST = 2**63 - 1, 3e38


@dataclass
class Settings:
    """Everything that a run depends on; the command's options of the same names.

    ``lr="auto"`` sets ``auto_lr``: before its first step the run probes, and puts the rate that it
    took into ``lr``, and into ``tuned`` what it went by.
    """

    model: str
    out: Path
    task: str = "sst2"
    template: bool = True
    chat: bool = False
    shots: int | None = None
    demos: int = 0
    calibrate: bool = False
    objective: str | None = None
    data: str | None = None
    optimizer: str = "zosgd"
    steps: int = 1000
    batch_size: int = 16
    lr: float = 1e-6
    auto_lr: bool = False
    probe_forwards: int = 800
    tuned: dict[str, Any] | None = None
    schedule: str = "constant"
    eps: float = 1e-3
    eps_schedule: str = "constant"
    eps_end: float | None = None
    num_queries: int = 1
    estimator: str = "two_sided"
    normalize: str | None = None
    clip: float | None = None
    dist: str = "gaussian"
    sparsity: float | None = None
    resample_every: int | None = None
    blocks: str | None = None
    block_order: str = "sequential"
    hybrid_split: int | None = None
    fo_lr: float | None = None
    fo_optimizer: str = "fo-adam"
    scheme: str = "full"
    train_only: str | None = None
    weight_decay: float = 0.0
    rounding: str = "nearest"
    seed: int = 0
    eval_every: int = 0
    eval_examples: int | None = None
    keep_best: bool = False
    save_weights: bool = True
    dtype: str = "float32"
    perturb: str | None = None
    points: int | str = 2
    backend: str | None = None
    min_words: int | None = None
    max_words: int | None = None
    max_length: int = 256
    balanced: bool = False
    retry_oom: bool = False
    overwrite: bool = False
    device: str = "cpu"
    name: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.points, str) and self.points.isdecimal():
            self.points = int(self.points)
        if self.lr == AUTO:
            self.lr, self.auto_lr = 0.0, True

    @classmethod
    def of(cls, plain: dict[str, Any], source: Path, out: Path) -> "Settings":
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

    def check(self) -> None:
        """Refuses what no run could use.

        Raises:
            InputError: Naming the option, what it got and what it allows.
        """
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{option(name)} must be at least {least}, got {value}.")
            if value is not None and value > _MOST:
                raise InputError(f"{option(name)} must be at most {_MOST}, got {value}.")
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                known = ", ".join(a for a in allowed if a is not None)
                raise InputError(f"{option(name)} must be one of {known}, got '{value}'.")
        for name in ("lr", "fo_lr", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= _LARGEST:
                raise InputError(
                    f"{option(name)} must be a number from 0 up to {_LARGEST:g}, got {value}."
                )
        for name in ("eps", "eps_end", "clip"):
            value = getattr(self, name)
            if value is not None and not 1 / _LARGEST <= value <= _LARGEST:
                raise InputError(
                    f"{option(name)} must be a number above 0, from {1 / _LARGEST:.0e} to "
                    f"{_LARGEST:g}, got {value}."
                )
        self._check_estimate()
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise InputError(f"--sparsity must lie between 0 and 1, got {self.sparsity}.")
        if self.resample_every and self.sparsity is None:
            raise InputError(
                "--resample-every needs --sparsity, whose mask it draws again; add it."
            )
        if self.min_words and self.max_words and self.min_words > self.max_words:
            raise InputError(
                f"--min-words {self.min_words} is above --max-words {self.max_words}; swap them."
            )
        if self.points != "all" and not (type(self.points) is int and self.points >= 2):
            raise InputError(f"--points must be a number from 2 on, or all, got '{self.points}'.")
        if self.points != 2 and self.perturb != "paired":
            raise InputError(
                f"--points {self.points} needs --perturb paired, which runs points in one forward."
            )
        if self.keep_best and not self.eval_every:
            raise InputError("--keep-best needs --eval-every, which says how often to look.")

    def _check_estimate(self) -> None:
        for name in ("estimator", "normalize"):
            value = getattr(self, name)
            if value in ("population", "std") and self.num_queries < 2:
                raise InputError(
                    f"{option(name)} {value} compares the directions of a step, and --num-queries "
                    f"is {self.num_queries}; make it at least 2."
                )
        if (self.eps_end is None) != (self.eps_schedule == "constant"):
            raise InputError(
                "--eps-schedule linear or cosine and --eps-end, the scale that it ends with, go "
                f"together; got --eps-schedule {self.eps_schedule} and --eps-end {self.eps_end}."
            )

    def evaluates_after(self, step: int) -> bool:
        """Whether a step during training is followed by an evaluation."""
        return self.eval_every > 0 and step % self.eval_every == 0 and step < self.steps

    def factor(self, step: int) -> float:
        """The share of the learning rate in use at a step, counted from 0."""
        return self._left(self.schedule, step)

    def eps_factor(self, step: int) -> float:
        """The share of ε in use at a step, counted from 0."""
        last = 1.0 if self.eps_end is None else self.eps_end / self.eps
        return last + (1 - last) * self._left(self.eps_schedule, step)

    def _left(self, schedule: str, step: int) -> float:
        """How much of its way a schedule has before it."""
        if schedule == "linear":
            return 1 - step / self.steps
        if schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return 1.0


def option(name: str) -> str:
    """The command's option for a setting."""
    return f"--{name.replace('_', '-')}"
