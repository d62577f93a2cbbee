"""The folder of a sweep: which one may be used, and by one sweep at a time."""

from __future__ import annotations

from pathlib import Path

from zokernels.lab.errors import InputError
from zokernels.lab.files import write_text
from zokernels.lab.runs import lock
from zokernels.lab.runs.folder import is_empty

COPY = "sweep.yaml"


class SweepFolder:
    """A context in which a sweep has its folder to itself.

    Args:
        path: Where; absent, empty, or an earlier sweep's.
        text: The sweep file, of which a copy stays.

    Raises:
        InputError: If it holds something else, another sweep is at work in it, or it cannot be
            written.
    """

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text = path, text
        self._lock: lock.FolderLock | None = None

    def __enter__(self) -> SweepFolder:
        path = self.path
        try:
            if path.exists():
                self._check_kind()
            self._lock = lock.FolderLock(path, "sweep")
            # Another process may have been here until now.
            self._check_kind()
            write_text(path / COPY, self.text)
        except BaseException as error:
            self.__exit__()
            if isinstance(error, OSError):
                raise InputError(f"--out {path} cannot be written: {error.strerror}.") from None
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()

    def _check_kind(self) -> None:
        if not self.path.is_dir():
            raise InputError(f"--out {self.path} is a file; name a folder.")
        if not (is_empty(self.path) or (self.path / COPY).is_file()):
            raise InputError(
                f"--out {self.path} exists and is not the folder of a sweep; name another."
            )
