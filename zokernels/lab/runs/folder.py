"""The run folder: what is in it, and when one may be replaced."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from zokernels.lab import files
from zokernels.lab.errors import InputError
from zokernels.lab.runs import lock

CONFIG, METRICS, LOG = "config.json", "metrics.json", "metrics.jsonl"
PLOT, REPORT, WEIGHTS, TRAJECTORY = "plot.png", "report.md", "final", "trajectory.zk"
CHECKPOINT, MERGED = "checkpoint.pt", "merged"
# Of TensorBoard, where a run reports to it.
EVENTS = "tensorboard"
MARK = "zokernels_run"
_FILES = (METRICS, LOG, PLOT, REPORT, TRAJECTORY, CHECKPOINT)
_FOLDERS = (WEIGHTS, MERGED, EVENTS)


def is_run(path: Path) -> bool:
    """Whether a run has begun in this folder."""
    config = files.read_json(path / CONFIG)
    return isinstance(config, dict) and MARK in config


def holder(path: Path, out: Path | None = None) -> Path | None:
    """The run folder of which a path is one of the run's own files, or lies in one of its own.

    Args:
        path: Any; it may be absent.
        out: A folder that a run is to begin in.
    """
    whole, own = path.resolve(), {CONFIG, *_FILES, *_FOLDERS}
    beginning = out.resolve() if out else None
    for parent in whole.parents:
        if whole.relative_to(parent).parts[0] in own and (parent == beginning or is_run(parent)):
            return parent
    return None


def is_finished(path: Path) -> bool:
    """Whether the run in this folder came to its end."""
    metrics = files.read_json(path / METRICS)
    return isinstance(metrics, dict) and not (metrics.get("interrupted") or metrics.get("failure"))


def is_empty(path: Path) -> bool:
    """Whether a folder holds nothing but what a process left that was killed as it began."""
    return all(p.name == lock.NAME or p.name.startswith(f".{CONFIG}.") for p in path.iterdir())


class Elsewhere:
    """The folder of a run of which another process writes it.

    Args:
        path: Where.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, config: dict[str, Any]) -> None:
        """Nothing."""

    def resume(self, records: list[dict[str, Any]]) -> None:
        """Nothing."""

    def log(self, record: dict[str, Any]) -> None:
        """Nothing."""


class RunFolder:
    """A folder that one run fills; a context in which no other process does.

    Args:
        path: Where; it may be absent or empty.
        overwrite: Whether an earlier run there may be replaced.
        resume: Whether an earlier run there is to go on.
        reads: Files and folders that the new run reads.

    Raises:
        InputError: On entry, if it holds something else, an earlier run and not ``overwrite``, an
            earlier run with what the new one reads, or another process is at work in it. Nothing is
            written or removed before ``begin``.
    """

    def __init__(
        self,
        path: Path,
        overwrite: bool = False,
        resume: bool = False,
        reads: Iterable[Path] = (),
    ) -> None:
        self.path = path
        self._reads = reads
        self._kept = not (overwrite or resume)
        self._resumed = resume
        self._lock: lock.FolderLock | None = None
        self._log: IO[str] | None = None

    def __enter__(self) -> RunFolder:
        # An absent folder stays absent until there is something to write.
        try:
            if self.path.exists():
                self._take()
        except OSError as error:
            raise self._unusable(error) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._log is not None:
            # On a full disk what `log` could not write, and said so, is still in its buffer.
            with suppress(OSError):
                self._log.close()
        if self._lock is not None:
            self._lock.release()

    def _take(self) -> None:
        if self._lock is not None:
            return
        if self.path.exists():
            self._check_kind()
        self._lock = lock.FolderLock(self.path, "run")
        try:
            # Another process may have been here until now.
            self._check_kind()
            self._check_earlier()
        except BaseException:
            self._lock.release()
            raise

    def _check_kind(self) -> None:
        if not self.path.is_dir():
            raise InputError(f"--out {self.path} is a file; name a folder.")
        if not (is_empty(self.path) or is_run(self.path)):
            raise InputError(f"--out {self.path} exists and is not a run folder; choose another.")

    def _check_earlier(self) -> None:
        if self._kept and is_run(self.path):
            raise InputError(
                f"--out {self.path} holds an earlier run; choose another or pass --overwrite."
            )
        if not self._resumed and is_run(self.path):
            for source in self._reads:
                if holder(source) == self.path.resolve():
                    raise InputError(
                        f"--overwrite would remove {source}, which the new run reads; choose "
                        f"another --out, or move it out of {self.path} first."
                    )
        if self._resumed and is_finished(self.path):
            raise InputError(
                f"--resume {self.path}: that run is finished; see {self.path / REPORT}."
            )

    def _unusable(self, error: OSError) -> InputError:
        return InputError(f"--out {self.path} cannot be written: {error.strerror}.")

    def begin(self, config: dict[str, Any]) -> None:
        """Removes an earlier run's files and writes the new configuration."""
        try:
            self._take()
            self._remove_drafts()
            for name in _FILES:
                (self.path / name).unlink(missing_ok=True)
            for name in _FOLDERS:
                if (self.path / name).is_dir():
                    shutil.rmtree(self.path / name)
            files.write_json(self.path / CONFIG, {MARK: 1, **config})
            self._log = (self.path / LOG).open("w", encoding="utf-8")
        except OSError as error:
            raise self._unusable(error) from None

    def resume(self, records: list[dict[str, Any]]) -> None:
        """Goes on with an earlier run's log, of which these records stay."""
        lines = "".join(files.json_of(r) + "\n" for r in records)
        try:
            self._remove_drafts()
            files.write_text(self.path / LOG, lines)
            self._log = (self.path / LOG).open("a", encoding="utf-8")
        except OSError as error:
            raise self._unusable(error) from None

    def _remove_drafts(self) -> None:
        """Those of a process that was killed while it wrote them."""
        for name in (CONFIG, METRICS, LOG, REPORT):
            for draft in self.path.glob(f".{name}.*"):
                draft.unlink()

    def log(self, record: dict[str, Any]) -> None:
        """Appends a line to the metrics, readable at once."""
        if self._log is None:
            raise RuntimeError("The run folder has not begun.")
        self._log.write(files.json_of(record) + "\n")
        self._log.flush()
