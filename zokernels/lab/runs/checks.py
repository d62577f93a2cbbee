"""Which settings no run could use: each by itself, together, and with the optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from zokernels.lab.errors import InputError
from zokernels.lab.models import quantised
from zokernels.lab.runs import optimizers
from zokernels.lab.runs.optimizers import DERIVATIVES, FIRST_ORDER, HYBRID
from zokernels.lab.runs.settings import LIMIT, Settings, option
from zokernels.lab.tasks import data

_HYBRID_ONLY = {
    "hybrid_split": "the number of layers that go by zeroth order",
    "fo_lr": "the learning rate of the other layers",
}
# What a rule that takes derivatives has no use for.
_DIFFERENCES_ONLY = ("estimator", "eps_schedule")
_ZEROTH_ORDER_ONLY = (
    "num_queries estimator normalize clip dist sparsity resample_every blocks rounding perturb "
    "points backend eps_schedule".split()
)
_LORA_ONLY = ("lora_rank", "lora_alpha", "lora_targets", "lora_dropout")
# The rules of which a rate follows from what a probe measures.
_PROBED = ("zosgd", "zosgdmomentum", "zosgdsign")


def check(s: Settings) -> None:
    """Refuses what no run could use, before anything is loaded.

    Raises:
        InputError: Naming the option, what it got and what it allows.
    """
    check_each(s)
    _check_together(s)
    _check_optimizer(s)


def check_each(s: Settings) -> None:
    """Refuses settings that no command could use.

    Raises:
        InputError: As `check`.
    """
    for setting in fields(s):
        limit = setting.metadata.get(LIMIT)
        if limit and (refusal := limit.refusal(getattr(s, setting.name))):
            raise InputError(f"{option(setting.name)} {refusal}")
    s.the_task()
    data.parsed(s.columns)


def check_probed(s: Settings, asked_by: str) -> None:
    """Refuses to probe along differences that an optimizer does not take.

    Raises:
        InputError: Naming the option and what to do.
    """
    plain = optimizers.key(s.optimizer)
    if plain in FIRST_ORDER:
        raise InputError(
            f"{asked_by} is for zeroth-order optimizers, and --optimizer {s.optimizer} goes by "
            "backpropagation; give it a rate."
        )
    if plain == DERIVATIVES:
        raise InputError(
            f"{asked_by} measures differences at an eps, and --optimizer {s.optimizer} takes "
            "derivatives; zokernels tune --optimizer zosgd tells a rate that is right for it too."
        )


def _check_together(s: Settings) -> None:
    for name in ("estimator", "normalize"):
        value = getattr(s, name)
        if value in ("population", "std") and s.num_queries < 2:
            raise InputError(
                f"{option(name)} {value} compares the directions of a step, and --num-queries "
                f"is {s.num_queries}; make it at least 2."
            )
    if (s.eps_end is None) != (s.eps_schedule == "constant"):
        raise InputError(
            "--eps-schedule linear or cosine and --eps-end, the scale that it ends with, go "
            f"together; got --eps-schedule {s.eps_schedule} and --eps-end {s.eps_end}."
        )
    if s.resample_every and s.sparsity is None:
        raise InputError("--resample-every needs --sparsity, whose mask it draws again; add it.")
    if s.min_words and s.max_words and s.min_words > s.max_words:
        raise InputError(
            f"--min-words {s.min_words} is above --max-words {s.max_words}; swap them."
        )
    if s.points != 2 and s.perturb != "paired":
        raise InputError(
            f"--points {s.points} needs --perturb paired, which runs points in one forward."
        )
    if s.keep_best and not (s.eval_every and s.eval_examples != 0):
        raise InputError(
            "--keep-best needs --eval-every, which says how often to look, and --eval-examples "
            "that are not 0."
        )
    if s.patience is not None and not s.keep_best:
        raise InputError("--patience needs --keep-best, whose evaluations it counts.")
    if s.warmup and s.warmup >= s.steps:
        raise InputError(
            f"--warmup {s.warmup} leaves none of the {s.steps} --steps at the full rate; lower it."
        )
    if s.objective not in (None, "tokens") and s.the_task().generates:
        raise InputError(
            f"--objective {s.objective} compares candidates, and the answers of task {s.task} are "
            "written; take --objective tokens, or leave it out."
        )
    if s.load_in and s.scheme not in quantised.SCHEMES:
        raise InputError(
            f"--load-in {s.load_in} quantises what stays frozen, and --scheme {s.scheme} trains "
            f"it; take one of {', '.join(quantised.SCHEMES)}."
        )
    if s.load_in and s.merge:
        raise InputError(
            f"--merge writes a whole model, and the base is in {s.load_in}; load the adapter with "
            "the base as it was, and merge there."
        )
    for name in _given(s, _LORA_ONLY) if s.scheme != "lora" else ():
        raise InputError(f"{option(name)} is for --scheme lora; got --scheme {s.scheme}.")


def _check_optimizer(s: Settings) -> None:
    plain = optimizers.key(s.optimizer)
    for name, what in _HYBRID_ONLY.items():
        value = getattr(s, name)
        if plain == HYBRID and value is None:
            raise InputError(f"--optimizer {s.optimizer} needs {option(name)}: {what}.")
        if plain != HYBRID and value is not None:
            raise InputError(
                f"{option(name)} is for --optimizer hybrid; got --optimizer {s.optimizer}."
            )
    if optimizers.key(s.fo_optimizer) not in FIRST_ORDER:
        raise InputError(
            f"--fo-optimizer must be one of {', '.join(FIRST_ORDER)}, got '{s.fo_optimizer}'."
        )
    if s.auto_lr:
        check_probed(s, "--lr auto")
        if plain not in _PROBED or s.blocks:
            what = "--blocks" if s.blocks else f"--optimizer {s.optimizer}"
            raise InputError(
                f"--lr auto: no rate follows from a probe with {what}; give --lr a number, or "
                "leave that out."
            )
    if s.lora_dropout and plain not in FIRST_ORDER:
        raise InputError(
            f"--lora-dropout is for --optimizer {' and '.join(FIRST_ORDER)}: the forwards of a "
            f"zeroth-order step are compared, so that dropout is off in them; got --optimizer "
            f"{s.optimizer}."
        )
    if plain == DERIVATIVES:
        for name in _given(s, _DIFFERENCES_ONLY):
            raise InputError(
                f"{option(name)} is for optimizers that take differences, and --optimizer "
                f"{s.optimizer} takes derivatives; leave it out."
            )
    if plain not in (*FIRST_ORDER, HYBRID):
        return
    if s.objective == "accuracy":
        raise InputError(
            f"--objective accuracy has no gradient, and --optimizer {s.optimizer} needs one; use a "
            "zeroth-order optimizer, or the objective candidates."
        )
    if plain != HYBRID:
        for name in _given(s, _ZEROTH_ORDER_ONLY):
            raise InputError(
                f"{option(name)} is for zeroth-order optimizers, and --optimizer "
                f"{s.optimizer} goes by backpropagation; leave it out."
            )


def _given(s: Settings, names: Iterable[str]) -> list[str]:
    """Those that are not what they are without a word."""
    return [name for name in names if getattr(s, name) != getattr(Settings, name)]
