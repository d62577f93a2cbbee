"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from zokernels.lab.errors import InputError, RunError


def sync(path: Path) -> None:
    """Makes a file durable, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all: to a neighbour first, then renamed over ``path``."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, as `write_text` does."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def json_of(value: Any, **form: Any) -> str:
    """A value as JSON, which has no NaN and no ∞: they are null.

    Args:
        value: What `json.dumps` takes.
        form: Its keywords.
    """
    return json.dumps(finite(value), allow_nan=False, **form)


def finite(value: Any) -> Any:
    """The value with None in place of every number that is not finite."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes ``value`` whole or not at all, as `json_of` has it."""
    write_text(path, json_of(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """What a file holds; None if it is not there, or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Writes a folder whole or not at all: ``fill`` gets a new one, which then takes its place.

    Raises:
        OSError: If it could not be written; what was there before is there still.
    """
    draft, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    for leftover in (draft, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        draft.mkdir()
        try:
            fill(draft)
        except Exception as error:
            # Writers of weights have errors of their own for a full disk.
            raise error if isinstance(error, OSError) else OSError(0, str(error)) from error
        for file in draft.rglob("*"):
            if file.is_file():
                sync(file)
        if path.exists():
            path.rename(old)
        draft.rename(path)
        # Not every system can.
        with suppress(OSError):
            sync(path.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_answer(path: Path, value: dict[str, Any]) -> None:
    """Writes what ``--json`` asks for, as `write_json` does.

    Raises:
        RunError: If it cannot be written; what was there before is there still.
    """
    try:
        write_json(path, value)
    except OSError as error:
        raise RunError(
            f"--json {path} could not be written: {error.strerror}. All else is done."
        ) from None


def check_writable(path: Path, option: str) -> None:
    """Refuses, before a run is begun, a file that could not be written at its end."""
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder; name a file.")
    # A device, such as /dev/full, would be replaced by a file.
    if path.exists() and not path.is_file():
        raise InputError(f"{option} {path} is no ordinary file; name one, or a new one.")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{option} {path}: its folder does not exist; make it first.")
    try:
        tempfile.TemporaryFile(dir=path.absolute().parent).close()
    except OSError as error:
        raise InputError(
            f"{option} {path} cannot be written: {error.strerror}; name a file elsewhere."
        ) from None
