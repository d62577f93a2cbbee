"""The optimizers by name: all that `zokernels` has, and the first-order baselines."""

import inspect
from typing import Any

import zokernels as zk
from zokernels.lab.tasks.backprop import FIRST_ORDER
from zokernels.lab.tasks.errors import InputError
from zokernels.lab.tasks.settings import Settings, option

HYBRID, DERIVATIVES = "hybridzo", "forwardgrad"
_ZEROTH_ORDER = (
    zk.ZOSGD, zk.ZOAdam, zk.ZOSGDConservative, zk.ZOSGDMomentum, zk.ZOSGDSign, zk.ForwardGrad,
    zk.HybridZO,
)  # fmt: skip
OPTIMIZERS: dict[str, Any] = {c.__name__.lower(): c for c in _ZEROTH_ORDER} | FIRST_ORDER
# The names of the benchmark paper, where they are not the classes' own.
_ALIASES = {
    "hybrid": HYBRID,
    "zosgdmmt": "zosgdmomentum",
    "zosgdcons": "zosgdconservative",
}
_HYBRID_ONLY = {
    "hybrid_split": "the number of layers that go by zeroth order",
    "fo_lr": "the learning rate of the other layers",
}
# What a rule that takes derivatives has no use for.
_DIFFERENCES_ONLY = ("estimator", "eps_schedule")
# The rules of which a rate follows from what a probe measures.
_PROBED = ("zosgd", "zosgdmomentum", "zosgdsign")
_ZEROTH_ORDER_ONLY = (
    "num_queries estimator normalize clip dist sparsity resample_every blocks rounding perturb "
    "points backend eps_schedule".split()
)


def key(name: str) -> str:
    """The name in the table of an optimizer, in any case, with or without hyphens.

    Raises:
        InputError: If there is none.
    """
    plain = name.lower().replace("-", "").replace("_", "")
    plain = _ALIASES.get(plain, plain)
    if plain not in OPTIMIZERS:
        raise InputError(f"--optimizer must be one of {', '.join(OPTIMIZERS)}, got '{name}'.")
    return plain


def find(name: str) -> Any:
    """The optimizer called ``name``: "zo-sgd" is `ZOSGD`, "fo-adam" torch's Adam.

    Raises:
        InputError: If there is none.
    """
    return OPTIMIZERS[key(name)]


def check(s: Settings) -> None:
    """Refuses settings that do not go together.

    Raises:
        InputError: Naming the option and what to do.
    """
    plain = key(s.optimizer)
    for name, what in _HYBRID_ONLY.items():
        value = getattr(s, name)
        if plain == HYBRID and value is None:
            raise InputError(f"--optimizer {s.optimizer} needs {option(name)}: {what}.")
        if plain != HYBRID and value is not None:
            raise InputError(
                f"{option(name)} is for --optimizer hybrid; got --optimizer {s.optimizer}."
            )
    if key(s.fo_optimizer) not in FIRST_ORDER:
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
    if plain == DERIVATIVES:
        for name in _DIFFERENCES_ONLY:
            if getattr(s, name) != getattr(Settings, name):
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
    for name in _ZEROTH_ORDER_ONLY:
        if plain != HYBRID and getattr(s, name) != getattr(Settings, name):
            raise InputError(
                f"{option(name)} is for zeroth-order optimizers, and --optimizer "
                f"{s.optimizer} goes by backpropagation; leave it out."
            )


def check_probed(s: Settings, asked_by: str) -> None:
    """Refuses to probe along differences that an optimizer does not take.

    Raises:
        InputError: Naming the option and what to do.
    """
    plain = key(s.optimizer)
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


def build(name: str, model: Any, options: dict[str, Any]) -> Any:
    """The optimizer over a model, with those of the options that it has.

    Raises:
        InputError: If there is no such optimizer, or it refuses an option.
    """
    plain, cls = key(name), find(name)
    given = dict(options)
    if plain == HYBRID:
        deep = FIRST_ORDER[key(given["fo_optimizer"])].__mro__[2]
        given["split"], rate = given["hybrid_split"], given["fo_lr"]
        decay = given["weight_decay"]
        given["fo_optimizer"] = lambda params: deep(params, lr=rate, weight_decay=decay)
    has = _keywords(cls)
    try:
        return cls(model, **{k: v for k, v in given.items() if k in has})
    except (ValueError, RuntimeError, ImportError) as error:
        raise InputError(str(error)) from error


def _keywords(cls: type) -> set[str]:
    """What its constructor takes, up the bases for as long as each passes the rest on."""
    found: set[str] = set()
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        own = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        found |= {p.name for p in own}
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            break
    return found
