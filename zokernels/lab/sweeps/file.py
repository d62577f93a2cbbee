"""The sweep file: YAML whose every key is checked, and whose errors name the key."""

from __future__ import annotations

import os
import string
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from zokernels.lab import yaml_file
from zokernels.lab.errors import InputError, shown
from zokernels.lab.runs.settings import Settings
from zokernels.lab.yaml_file import known, mapping

# What a sweep decides itself.
_OWN = ("out", "overwrite", "seed", "tuned")
_TYPES: dict[str, Any] = {
    name: kind for name, kind in typing.get_type_hints(Settings).items() if name not in _OWN
}
_KNOWN = {f.name for f in fields(Settings)}
PRESET, PUBLISHED = "preset", "published"


@dataclass(frozen=True)
class Rule:
    """What holds for the cells of a grid that it matches.

    Attributes:
        where: Its key in the file.
        when: Settings and the values that each may have.
        set: Settings that those cells have.
        seeds: Their seeds, where they differ.
        skip: Why they are left out; "" if an earlier rule's word does not hold for them.
    """

    where: str
    when: dict[str, list[Any]]
    set: dict[str, Any]
    seeds: list[int] | None = None
    skip: str | None = None


@dataclass(frozen=True)
class Part:
    """A grid: settings for all of it, lists of values, and seeds."""

    name: str
    base: dict[str, Any]
    grid: dict[str, Any]
    seeds: list[int]
    rules: list[Rule] = field(default_factory=list)


@dataclass(frozen=True)
class SweepFile:
    """What the file says."""

    title: str
    parts: list[Part]
    text: str


def read(path: Path) -> SweepFile:
    """Reads and checks a sweep file.

    Raises:
        InputError: One sentence with the key that cannot be used, and what it allows.
    """
    text = yaml_file.read(path, "sweep file")
    whole = mapping(yaml_file.load(text, path, "sweep file"), path, "the file")
    top = {"title", "base", "grid", "seeds", "rules", "parts"}
    known(whole, top, path, "")
    title = str(whole.get("title", path.stem))
    if "parts" not in whole:
        return SweepFile(title, [_part(path.stem, whole, {}, path, "")], text)
    if "grid" in whole:
        raise InputError(f"{path}: grid stands beside parts; move it into one of them.")
    shared = {key: whole[key] for key in ("base", "seeds", "rules") if key in whole}
    parts = []
    for name, part in mapping(whole["parts"], path, "parts").items():
        where = f"parts.{name}."
        if not str(name).replace("-", "").replace("_", "").isalnum():
            raise InputError(f"{path}: {where[:-1]} must be a name of letters, digits, - and _.")
        known(mapping(part, path, where[:-1]), top - {"title", "parts"}, path, where)
        parts.append(_part(str(name), part, shared, path, where))
    if not parts:
        raise InputError(f"{path}: parts is empty; give it a part with a grid.")
    return SweepFile(title, parts, text)


def _part(
    name: str, part: Mapping[str, Any], shared: Mapping[str, Any], path: Path, where: str
) -> Part:
    base = {
        **_settings(shared.get("base", {}), path, "base"),
        **_settings(part.get("base", {}), path, f"{where}base"),
    }
    grid: dict[str, Any] = {}
    for key, values in mapping(part.get("grid", {}), path, f"{where}grid").items():
        at = f"{where}grid.{key}"
        if values == PUBLISHED and key in ("lr", "eps"):
            grid[key] = PUBLISHED
            continue
        if not isinstance(values, list) or not values:
            raise InputError(f"{path}: {at} must be a list of values, got {shown(values)}.")
        grid[key] = [value(key, v, path, f"{at}[{i}]") for i, v in enumerate(values)]
        for i, v in enumerate(grid[key]):
            if v in grid[key][:i]:
                raise InputError(f"{path}: {at}[{i}] is there already; each value once.")
    rules = [
        _rule(rule, path, f"{place}rules[{i}]", set(grid))
        for place, source in (("", shared), (where, part))
        for i, rule in enumerate(_list(source.get("rules", []), path, f"{place}rules"))
    ]
    seeds = part.get("seeds", shared.get("seeds", [0]))
    return Part(name, base, grid, _seeds(seeds, path, f"{where}seeds"), rules)


def _rule(rule: Any, path: Path, where: str, grid: set[str]) -> Rule:
    known(mapping(rule, path, where), {"when", "set", "seeds", "skip"}, path, f"{where}.")
    when = {
        key: [
            value(key, v, path, f"{where}.when.{key}")
            for v in (values if isinstance(values, list) else [values])
        ]
        for key, values in mapping(rule.get("when", {}), path, f"{where}.when").items()
    }
    given = _settings(rule.get("set", {}), path, f"{where}.set")
    if both := sorted({*given} & grid):
        raise InputError(
            f"{path}: {where}.set.{both[0]} is a key of the grid too; leave it out of one."
        )
    seeds = _seeds(rule["seeds"], path, f"{where}.seeds") if "seeds" in rule else None
    skip = rule.get("skip")
    if isinstance(skip, bool):
        skip = "by the file" if skip else ""
    elif "skip" in rule and not (isinstance(skip, str) and skip.strip()):
        raise InputError(
            f"{path}: {where}.skip must be true, false or a text that says why, got {shown(skip)}."
        )
    return Rule(where, when, given, seeds, skip)


def _seeds(seeds: Any, path: Path, where: str) -> list[int]:
    found = seeds if isinstance(seeds, list) else [seeds]
    if not found or any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in found):
        raise InputError(f"{path}: {where} must be whole numbers from 0 up, got {shown(seeds)}.")
    return list(dict.fromkeys(found))


def _settings(given: Any, path: Path, where: str) -> dict[str, Any]:
    return {
        key: value(key, v, path, f"{where}.{key}") for key, v in mapping(given, path, where).items()
    }


def value(key: str, given: Any, path: Path, where: str) -> Any:
    """A setting's value, of the setting's type.

    Raises:
        InputError: If there is no such setting, or the value is of another type.
    """
    if key == PRESET:
        return str(given)
    if key not in _TYPES:
        own = f"{key} is the sweep's own" if key in _KNOWN else "there is no such setting"
        more = "use seeds." if key == "seed" else "zokernels finetune --help lists them."
        raise InputError(f"{path}: {where}: {own}; {more}")
    kinds = typing.get_args(_TYPES[key]) or (_TYPES[key],)
    if given is None and type(None) in kinds:
        return None
    if int in kinds and type(given) is int:
        return given
    if bool in kinds:
        if isinstance(given, bool):
            return given
    elif str in kinds:
        if isinstance(given, str):
            return _expanded(given, path, where)
    elif not isinstance(given, bool):
        # YAML 1.1 takes 1e-6, which has no dot, for a text.
        kind = int if int in kinds else float
        try:
            number = kind(given)
            if number == float(given):
                return number
        except (TypeError, ValueError):
            pass
    names = {bool: "true or false", str: "a text", int: "a whole number", float: "a number"}
    wanted = next(names[k] for k in (bool, str, int, float) if k in kinds)
    raise InputError(f"{path}: {where} must be {wanted}, got {shown(given)}.")


def _expanded(text: str, path: Path, where: str) -> str:
    try:
        return string.Template(text).substitute(os.environ)
    except KeyError as error:
        raise InputError(
            f"{path}: {where} is {text}, but the variable {error.args[0]} is not set; set it."
        ) from None
    except ValueError:
        return text


def _list(given: Any, path: Path, where: str) -> list[Any]:
    if not isinstance(given, list):
        raise InputError(f"{path}: {where} must be a list, got {shown(given)}.")
    return given
