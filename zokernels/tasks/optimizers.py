"""The optimizers by name: whatever `zokernels.optim` exports that needs no more than a model."""

import inspect
from typing import Any

from zokernels import optim
from zokernels.optim.base import ZOOptimizer
from zokernels.tasks.errors import InputError

OPTIMIZERS: dict[str, type[ZOOptimizer]] = {
    name.lower(): getattr(optim, name)
    for name in optim.__all__
    # A split of the model, and an optimizer for its deep part, are no options of a command yet.
    if name != "HybridZO"
}


def find(name: str) -> type[ZOOptimizer]:
    """The optimizer called ``name``, in any case, with or without hyphens: "zo-sgd" is `ZOSGD`.

    Raises:
        InputError: If there is none.
    """
    plain = name.lower().replace("-", "").replace("_", "")
    if plain not in OPTIMIZERS:
        raise InputError(f"--optimizer must be one of {', '.join(OPTIMIZERS)}, got '{name}'.")
    return OPTIMIZERS[plain]


def build(name: str, model: Any, options: dict[str, Any]) -> ZOOptimizer:
    """The optimizer over a model, with those of the options that it has.

    Raises:
        InputError: If there is no such optimizer, or it refuses an option.
    """
    cls = find(name)
    has = _keywords(cls)
    try:
        return cls(model, **{k: v for k, v in options.items() if k in has})
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
