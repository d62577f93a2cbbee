"""The folder of a sweep: which one may be used, and by one sweep at a time."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from zokernels.lab.tasks.errors import InputError
from zokernels.lab.tasks.folder import write_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

COPY, LOCK = "sweep.yaml", ".lock"


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
        self._lock: IO[str] | None = None

    def __enter__(self) -> SweepFolder:
        path = self.path
        if path.exists() and not path.is_dir():
            raise InputError(f"--out {path} is a file; name a folder.")
        if path.is_dir() and any(path.iterdir()) and not (path / COPY).is_file():
            raise InputError(f"--out {path} exists and is not the folder of a sweep; name another.")
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / LOCK).open("w", encoding="utf-8")
            if fcntl is not None:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write_text(path / COPY, self.text)
        except BlockingIOError:
            raise InputError(f"Another sweep is at work in --out {path}; wait for it.") from None
        except OSError as error:
            raise InputError(f"--out {path} cannot be written: {error.strerror}.") from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()
