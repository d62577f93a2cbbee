"""Checks of options that several commands have."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterable
from pathlib import Path

from zokernels.lab.errors import InputError
from zokernels.lab.runs import answers
from zokernels.lab.runs.limits import OneOf

_FORMS = (".png", ".svg", ".pdf")


def check_choice(option: str, value: str, allowed: Collection[str]) -> None:
    """Raise unless an option's value is one of those allowed.

    Raises:
        InputError: Naming them.
    """
    if refusal := OneOf(tuple(allowed)).refusal(value):
        raise InputError(f"{option} {refusal}")


def check_needs(what: str, package: str) -> None:
    """Raise unless a package is there that something can't do without.

    Raises:
        InputError: Saying how to install it.
    """
    if how := lacks(package):
        raise InputError(f"{what} needs {package}: {how}.")


def lacks(package: str) -> str:
    """How to install a package that is not there; empty where it is."""
    named = {"transformers": "'.[hf]'", "matplotlib": "'matplotlib>=3.8'"}
    there = importlib.util.find_spec(package) is not None
    return "" if there else f"pip install {named.get(package, package)}"


def check_plot(path: Path, reads: Iterable[Path] = ()) -> None:
    """Refuses, before anything is measured, a ``--plot`` as `answers.check` refuses a file."""
    check_needs("--plot", "matplotlib")
    if path.suffix.lower() not in _FORMS:
        raise InputError(f"--plot {path} must end in {', '.join(_FORMS[:-1])} or {_FORMS[-1]}.")
    answers.check(path, "--plot", reads)
