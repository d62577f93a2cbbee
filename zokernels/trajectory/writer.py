"""Appending to a trajectory so that a kill or a full disk loses at most the last record."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from weakref import WeakSet

from zokernels.trajectory import format as form
from zokernels.trajectory.format import TrajectoryError

try:
    import fcntl
except ImportError:  # Windows, which lets no second process write to an open file anyway
    fcntl = None  # type: ignore[assignment]


class Writer:
    """Appends frames to a file, each with one write to the system.

    A record is in the system's hands when `append` returns, so that the death of the process
    loses none; it is on the disk within ``sync_every`` seconds of further records and at `close`,
    so that a power cut loses that much, which a resume computes again.

    A record that cannot be written is taken off the file again and kept: the next `append` or
    `close` writes it first.

    Args:
        path: The file; for `create` it may not exist.
        sync_every: Longest time in seconds from a record to the next one that is synced to disk.
    """

    def __init__(self, path: Path, fd: int, size: int, check: int, sync_every: float):
        self.path = path
        self.size = size
        self._fd = fd
        self._check = check
        self._pending = b""
        self._sync_every = sync_every
        self._synced = time.monotonic()
        _open.add(self)
        _close_in_children()

    @classmethod
    def create(cls, path: Path, header: bytes, sync_every: float = 1.0) -> Writer:
        """Starts a file that has its header, or does not come to exist.

        Raises:
            TrajectoryError: If it exists, or cannot be written.
        """
        first, check = form.frame(form.HEADER, header, 0)
        # A name of its own: another process may be beginning the same file.
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
            try:
                _lock(fd, path)
                _write(fd, form.MAGIC + first)
                os.fsync(fd)
                _give_name(draft, path)
                sync_folder(path.parent)
            except BaseException:
                os.close(fd)
                raise
            finally:
                draft.unlink(missing_ok=True)
        except FileExistsError:
            raise TrajectoryError(
                f"{path} exists, and a trajectory never replaces another; name a new file, or go "
                "on with it by resume."
            ) from None
        except OSError as error:
            raise TrajectoryError(
                f"The trajectory {path} cannot be begun: {error.strerror}; nothing was changed."
            ) from error
        return cls(path, fd, len(form.MAGIC + first), check, sync_every)

    @classmethod
    def reopen(
        cls, path: Path, size: int, check: int, whole: int, sync_every: float = 1.0
    ) -> Writer:
        """Goes on after the first ``size`` bytes, whose check is ``check``; what follows is cut.

        Raises:
            TrajectoryError: If the file cannot be written, another process is recording to it, or
                has done since it was read, when it had ``whole`` bytes.
        """
        try:
            fd = os.open(path, os.O_WRONLY | os.O_APPEND)
            try:
                _lock(fd, path)
                if os.fstat(fd).st_size != whole:
                    raise TrajectoryError(
                        f"Another process recorded to {path} since it was read; load the base "
                        "model and resume again, to go on from its last step."
                    )
                os.ftruncate(fd, size)
                os.fsync(fd)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise TrajectoryError(
                f"The trajectory {path} cannot be written: {error.strerror}."
            ) from error
        return cls(path, fd, size, check, sync_every)

    def append(self, frames: Sequence[tuple[bytes, bytes]]) -> None:
        """Adds frames, each a kind and a payload.

        Raises:
            TrajectoryError: If it could not be written, or could not be synced. It is kept.
        """
        for kind, payload in frames:
            data, self._check = form.frame(kind, payload, self._check)
            self._pending += data
        self._flush()
        if time.monotonic() - self._synced >= self._sync_every:
            self._sync()

    def close(self) -> None:
        """Writes what was kept, syncs, and closes.

        Raises:
            TrajectoryError: If that fails; the file is closed all the same.
        """
        if self._fd < 0:
            return
        try:
            self._flush()
            self._sync()
        finally:
            self._drop()

    def _drop(self) -> None:
        os.close(self._fd)
        self._fd = -1
        _open.discard(self)

    def _flush(self) -> None:
        if self._fd < 0:
            raise TrajectoryError(f"The trajectory {self.path} is closed; nothing can be added.")
        try:
            _write(self._fd, self._pending)
        except OSError as error:
            # A part may have been written: back to the last whole record, if the disk lets us.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self.size)
            raise TrajectoryError(
                f"The trajectory {self.path} could not take its last record: {error.strerror}. "
                "The weights are right and the record is kept; make room, and the next step "
                "writes both."
            ) from error
        self.size += len(self._pending)
        self._pending = b""

    def _sync(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise TrajectoryError(
                f"The trajectory {self.path} could not be synced to the disk: {error.strerror}."
            ) from error
        self._synced = time.monotonic()


_open: WeakSet[Writer] = WeakSet()


@cache
def _close_in_children() -> None:
    """A forked child (a worker of a DataLoader) may outlive this process; its file is free then."""

    def close() -> None:
        for writer in list(_open):
            writer._drop()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=close)


class Nowhere(Writer):
    """The writer of a process that leaves the file to another one."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, frames: Sequence[tuple[bytes, bytes]]) -> None:
        """Leaves the frames to the process that has the file."""

    def close(self) -> None:
        """Nothing is open."""


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable, where the system can."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _give_name(draft: Path, path: Path) -> None:
    """Renames a file, unless another one has the name."""
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:
        # A file system without links, such as FAT.
        if path.exists():
            raise FileExistsError(path) from None
        os.rename(draft, path)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _lock(fd: int, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise TrajectoryError(
            f"Another process, or another optimizer of this one, is recording to {path}; wait for "
            "it, or end it (opt.trajectory.close())."
        ) from None
