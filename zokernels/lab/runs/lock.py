"""A folder that one process has to itself.

The lock is the system's (flock) on a file in the folder. It ends with the process, however that
ends, and the file that a killed process leaves behind locks nobody out. Windows has no flock:
nothing is locked there.
"""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from functools import cache
from pathlib import Path
from weakref import WeakSet

from zokernels.lab.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"


class FolderLock:
    """Holds a folder, which is made if it is absent, until `release`.

    Args:
        folder: Which.
        what: Who holds it, for the message to the next one: "run", "sweep".

    Raises:
        InputError: If another process holds it; nothing is changed then.
        OSError: If it cannot be made, or no file can be made in it.
    """

    def __init__(self, folder: Path, what: str) -> None:
        self.path = folder / NAME
        self._made = not folder.exists()
        self._fd = -1
        while self._fd < 0:
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                self._fd = _open(self.path)
            # Whoever held it may have taken the file away, or the folder, as this one opened it.
            if self._fd >= 0 and not _is(self._fd, self.path):
                os.close(self._fd)
                self._fd = -1
        _held.add(self)
        _end_at_fork()
        # Only a message needs it, so a full disk is none of its business.
        with suppress(OSError):
            os.ftruncate(self._fd, 0)
            os.write(self._fd, f"{what}\n{os.getpid()} on {platform.node()}".encode())

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Lets go, and takes away what nobody needs: the file, and a folder made for nothing."""
        if self._fd < 0:
            return
        with suppress(OSError):
            if _is(self._fd, self.path):
                self.path.unlink()
            if self._made:
                self.path.parent.rmdir()
        self._forget()

    def _forget(self) -> None:
        os.close(self._fd)
        self._fd = -1
        _held.discard(self)


_held: WeakSet[FolderLock] = WeakSet()


@cache
def _end_at_fork() -> None:
    """A child (a worker of a DataLoader) may outlive this process; the lock must not, with it."""

    def forget() -> None:
        for lock in list(_held):
            lock._forget()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=forget)


def _open(path: Path) -> int:
    """The file, locked."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        what, _, who = os.read(fd, 200).decode(errors="replace").partition("\n")
        os.close(fd)
        raise InputError(
            f"Another {what or 'process'} is at work in {path.parent}"
            f"{f' (process {who})' if who else ''}; wait for it, end it, or name another folder."
        ) from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _is(fd: int, path: Path) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
