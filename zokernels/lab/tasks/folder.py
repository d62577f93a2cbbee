"""The run folder: what is in it, and when one may be replaced."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from zokernels.lab.tasks.errors import InputError, RunError

CONFIG, METRICS, LOG = "config.json", "metrics.json", "metrics.jsonl"
PLOT, REPORT, WEIGHTS, TRAJECTORY = "plot.png", "report.md", "final", "trajectory.zk"
CHECKPOINT = "checkpoint.pt"
MARK = "zokernels_run"


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


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes ``value`` whole or not at all, without the NaN that JSON does not have."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


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


def is_run(path: Path) -> bool:
    """Whether a run has begun in this folder."""
    config = read_json(path / CONFIG)
    return isinstance(config, dict) and MARK in config


def check_json(path: Path | None) -> None:
    """Refuses, before a run is begun, a ``--json`` that could not be written at its end."""
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"--json {path} is a folder; name a file.")
    # A device, such as /dev/full, would be replaced by a file.
    if path.exists() and not path.is_file():
        raise InputError(f"--json {path} is no ordinary file; name one, or a new one.")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--json {path}: the folder {path.parent} does not exist; create it.")


class RunFolder:
    """A folder that one run fills.

    Args:
        path: Where; it may be absent or empty.
        overwrite: Whether an earlier run there may be replaced.
        resume: Whether an earlier run there is to go on.

    Raises:
        InputError: If it holds something else, or an earlier run and not ``overwrite``. Nothing
            is written or removed before ``begin``.
    """

    def __init__(self, path: Path, overwrite: bool = False, resume: bool = False) -> None:
        self.path = path
        self._log: IO[str] | None = None
        try:
            if path.exists() and not path.is_dir():
                raise InputError(f"--out {path} is a file; name a folder.")
            if not path.exists() or not any(path.iterdir()):
                return
        except OSError as error:
            raise InputError(f"--out {path} cannot be read: {error.strerror}.") from None
        if not is_run(path):
            raise InputError(f"--out {path} exists and is not a run folder; choose another.")
        if not overwrite and not resume:
            raise InputError(
                f"--out {path} holds an earlier run; choose another or pass --overwrite."
            )

    def begin(self, config: dict[str, Any]) -> None:
        """Removes an earlier run's files and writes the new configuration."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in (METRICS, LOG, PLOT, REPORT, TRAJECTORY, CHECKPOINT):
                (self.path / name).unlink(missing_ok=True)
            if (self.path / WEIGHTS).is_dir():
                shutil.rmtree(self.path / WEIGHTS)
            write_json(self.path / CONFIG, {MARK: 1, **config})
            self._log = (self.path / LOG).open("w", encoding="utf-8")
        except OSError as error:
            raise InputError(f"--out {self.path} cannot be written: {error.strerror}.") from None

    def resume(self, records: list[dict[str, Any]]) -> None:
        """Goes on with an earlier run's log, of which these records stay."""
        lines = "".join(json.dumps(r, allow_nan=False) + "\n" for r in records)
        try:
            # Drafts of a process that was killed while it wrote them.
            for name in (CONFIG, METRICS, LOG, REPORT):
                for draft in self.path.glob(f".{name}.*"):
                    draft.unlink()
            write_text(self.path / LOG, lines)
            self._log = (self.path / LOG).open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}.") from None

    def log(self, record: dict[str, Any]) -> None:
        """Appends a line to the metrics, readable at once."""
        if self._log is None:
            raise RuntimeError("The run folder has not begun.")
        self._log.write(json.dumps(record, allow_nan=False) + "\n")
        self._log.flush()

    def close(self) -> None:
        """Closes the log."""
        if self._log is not None:
            self._log.close()
            self._log = None
