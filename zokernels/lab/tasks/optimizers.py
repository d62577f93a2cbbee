"""The optimizers by name: all that `zokernels.optim` exports, and the first-order baselines."""

import inspect
from typing import Any

from zokernels import optim
from zokernels.lab.tasks.backprop import FIRST_ORDER
from zokernels.lab.tasks.errors import InputError

HYBRID = "hybridzo"
OPTIMIZERS: dict[str, Any] = {
    **{name.lower(): getattr(optim, name) for name in optim.__all__},
    **FIRST_ORDER,
}
# The names of the benchmark paper, where they are not the classes' own.
_ALIASES = {
    "hybrid": HYBRID,
    "zosgdmmt": "zosgdmomentum",
    "zosgdcons": "zosgdconservative",
}
# What only a zeroth-order step has, and its value where it was not asked for.
_ZEROTH_ORDER_ONLY: dict[str, Any] = {
    "num_queries": 1,
    "two_sided": True,
    "dist": "gaussian",
    "sparsity": None,
    "resample_every": None,
    "blocks": None,
    "rounding": "nearest",
    "perturb": None,
    "backend": None,
}


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


def replayable(name: str) -> bool:
    """Whether a log of scalars is all that the weights can be made of again."""
    return bool(find(name).replayable)


def check(name: str, options: dict[str, Any]) -> None:
    """Refuses options that do not go together.

    Args:
        name: The optimizer.
        options: The settings of the run.

    Raises:
        InputError: Naming the option and what to do.
    """
    plain = key(name)
    deep = {"--hybrid-split": options["hybrid_split"], "--fo-lr": options["fo_lr"]}
    for option, value in deep.items():
        if plain == HYBRID and value is None:
            raise InputError(
                f"--optimizer {name} needs {option}: "
                + ("the number of layers that go by zeroth order."
                   if option == "--hybrid-split" else "the learning rate of the other layers.")
            )  # fmt: skip
        if plain != HYBRID and value is not None:
            raise InputError(f"{option} is for --optimizer hybrid; got --optimizer {name}.")
    if key(options["fo_optimizer"]) not in FIRST_ORDER:
        raise InputError(
            f"--fo-optimizer must be one of {', '.join(FIRST_ORDER)}, got "
            f"'{options['fo_optimizer']}'."
        )
    if plain not in (*FIRST_ORDER, HYBRID):
        return
    if options["objective"] == "accuracy":
        raise InputError(
            f"--objective accuracy has no gradient, and --optimizer {name} needs one; use a "
            "zeroth-order optimizer, or the objective candidates."
        )
    for option, value in _ZEROTH_ORDER_ONLY.items():
        if plain != HYBRID and options[option] != value:
            raise InputError(
                f"{_option(option)} is for zeroth-order optimizers, and --optimizer "
                f"{name} goes by backpropagation; leave it out."
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


def _option(name: str) -> str:
    return "--one-sided" if name == "two_sided" else f"--{name.replace('_', '-')}"


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
