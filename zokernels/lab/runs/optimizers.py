"""The optimizers by name: all that `zokernels` has, and the first-order baselines."""

import inspect
from typing import Any

import zokernels as zk
from zokernels.lab.errors import InputError
from zokernels.lab.runs.backprop import FIRST_ORDER

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
