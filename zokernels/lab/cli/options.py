"""The settings of a run as options of a command."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field
from typing import Annotated, Any

import typer

from zokernels.lab.errors import InputError
from zokernels.lab.runs.presets import get
from zokernels.lab.runs.settings import AUTO, HELP, PANEL, Settings, described

Preset = Annotated[
    str | None,
    typer.Option(
        help="Settings of the benchmark paper, by name, or list; other options win.",
        rich_help_panel="Method",
    ),
]
_KINDS = typing.get_type_hints(Settings)


def with_settings(
    but: Iterable[str] = (), only: Iterable[str] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a command an option a setting, between its context and its own options.

    The command gets them as a dictionary, ``settings``.

    Args:
        but: Settings that it has no option for.
        only: Those that it has one for; None: all others.
    """
    wanted = {s.name for s in described()} - {*but} if only is None else {*only}
    theirs = [_parameter(setting) for setting in described() if setting.name in wanted]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        def whole(**given: Any) -> Any:
            settings = {p.name: given.pop(p.name) for p in theirs}
            return command(settings=settings, **given)

        signature = inspect.signature(command, eval_str=True)
        context, _, *own = (p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values())
        both = [context, *theirs, *own]
        # typer reads it.
        whole.__signature__ = inspect.Signature(both)  # type: ignore[attr-defined]
        whole.__annotations__ = {p.name: p.annotation for p in both}
        whole.__doc__, whole.__name__ = command.__doc__, command.__name__
        return whole

    return decorate


def resolved(
    context: typer.Context, settings: dict[str, Any], preset: str | None
) -> dict[str, Any]:
    """The options with those of a preset, where they were not given.

    Raises:
        InputError: If there is no such preset, or no model.
    """
    if preset is not None:
        given = {name for name in settings if is_given(context, name)}
        settings = settings | {k: v for k, v in get(preset).settings.items() if k not in given}
    if settings["model"] is None:
        raise InputError(
            "--model is missing: name a folder made by save_pretrained, a file in GGUF form, or a "
            "model on the hub."
        )
    return settings


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _parameter(setting: Field[Any]) -> inspect.Parameter:
    """A setting as typer reads a command's parameter."""
    kind, default = _KINDS[setting.name], setting.default
    more: dict[str, Any] = {}
    if default is MISSING:
        kind, default = kind | None, None
    if setting.name == "lr":
        kind, more = Any, {"parser": _rate, "metavar": "RATE"}
    elif kind == int | str:
        # typer knows no choice of types; the settings make a number of digits.
        kind, default = str, str(default)
    about = typer.Option(
        help=setting.metadata[HELP], rich_help_panel=setting.metadata[PANEL], **more
    )
    return inspect.Parameter(
        setting.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, about],
    )


def _rate(text: str) -> float | str:
    """A learning rate as the command line has it."""
    try:
        return AUTO if text == AUTO else float(text)
    except ValueError:
        raise typer.BadParameter(f"'{text}' is neither a number nor {AUTO}.") from None
