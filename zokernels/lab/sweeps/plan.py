"""The runs of a sweep: every cell of every grid, once a seed."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zokernels.lab.errors import InputError
from zokernels.lab.models import packages
from zokernels.lab.runs import checks, presets
from zokernels.lab.runs.settings import Settings
from zokernels.lab.sweeps.file import PRESET, PUBLISHED, Part, SweepFile


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        part: The part of the file that it is of.
        cell: The values of the grid's keys.
        settings: Everything that the run is told, its folder too.
    """

    part: str
    cell: dict[str, Any]
    settings: Settings

    @property
    def name(self) -> str:
        """What it is called on the screen."""
        return " ".join([self.part, *map(text, self.cell.values()), f"seed {self.settings.seed}"])


@dataclass(frozen=True)
class Skipped:
    """A cell that the file leaves out, and why."""

    part: str
    cell: dict[str, Any]
    reason: str


def plan(file: SweepFile, out: Path, path: Path) -> tuple[list[Run], list[Skipped]]:
    """The runs, and the cells that the file leaves out.

    Every cell once, in the order of the file, before any cell a second time.

    Args:
        file: What the file says.
        out: The sweep's folder.
        path: The file, for messages.

    Raises:
        InputError: If any run's settings cannot be used.
    """
    turns: list[tuple[int, Run]] = []
    skipped: list[Skipped] = []
    unused = {rule.where for part in file.parts for rule in part.rules}
    for part in file.parts:
        for cell, given in _cells(part, path):
            seeds, why = part.seeds, None
            for rule in part.rules:
                if all(given.get(k, _default(k)) in allowed for k, allowed in rule.when.items()):
                    unused.discard(rule.where)
                    given |= rule.set
                    seeds = rule.seeds or seeds
                    why = why if rule.skip is None else rule.skip
            if why:
                skipped.append(Skipped(part.name, cell, why))
                continue
            for turn, seed in enumerate(seeds):
                turns.append((turn, _run(part, cell, {**given, "seed": seed}, out, path)))
    if unused:
        raise InputError(
            f"{path}: {min(unused)} matches no cell; put its when right, or remove it."
        )
    runs = [run for _, run in sorted(turns, key=lambda one: one[0])]
    if not runs:
        raise InputError(f"{path} has no run that is not skipped.")
    return runs, skipped


def _cells(part: Part, path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The cells of a grid and their settings."""
    fixed = {k: v for k, v in part.grid.items() if v != PUBLISHED}
    for values in itertools.product(*fixed.values()):
        chosen = {**part.base, **dict(zip(fixed, values, strict=True))}
        preset = None
        if PRESET in chosen:
            preset = presets.get(chosen.pop(PRESET))
            chosen = {**preset.settings, **chosen}
        published: dict[str, Any] = {}
        for key in part.grid:
            if part.grid[key] == PUBLISHED:
                if preset is None:
                    raise InputError(
                        f"{path}: the grid's {key} is published, but there is no preset; add one."
                    )
                published[key] = preset.grid.get(key, (chosen.get(key, _default(key)),))
        for points in itertools.product(*published.values()):
            point = dict(zip(published, points, strict=True))
            cell = {
                key: point[key] if key in point else values[list(fixed).index(key)]
                for key in part.grid
            }
            yield cell, {**chosen, **point}


def _run(part: Part, cell: dict[str, Any], given: dict[str, Any], out: Path, path: Path) -> Run:
    where = f"{path}, part {part.name}" + "".join(f", {k} {text(v)}" for k, v in cell.items())
    try:
        if "model" not in given:
            raise InputError("there is no model; set one in base.")
        packages.located(given["model"])
        settings = Settings(out=out, **given)
        checks.check(settings)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    settings.out = out / part.name / _folder(cell, settings)
    return Run(part.name, cell, settings)


def _folder(cell: dict[str, Any], settings: Settings) -> str:
    """A name to read, and a checksum: other settings are another run."""
    # Defaults are left out, so that an option of a later version makes no difference.
    plain = {
        k: v
        for k, v in asdict(settings).items()
        if k not in ("out", "overwrite", "name") and v != _default(k)
    }
    check = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:8]
    words = [text(v) if k != PRESET else text(v).rsplit("/", 2)[-1] for k, v in cell.items()]
    name = "-".join(re.sub(r"[^\w.]+", "-", w).strip("-")[-40:] for w in words)
    return f"{name}-seed{settings.seed}-{check}".lstrip("-")


def text(value: Any) -> str:
    """A value as tables and folders have it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def _default(key: str) -> Any:
    return getattr(Settings(model="", out=Path()), key, None)
