"""Where a command may write an answer: over nothing that it reads, and nothing that a run keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from zokernels.lab import files
from zokernels.lab.errors import InputError
from zokernels.lab.runs import folder
from zokernels.lab.runs.settings import Settings
from zokernels.lab.tasks import data, description


def read_by(s: Settings) -> Iterator[Path]:
    """The files that a run with these settings reads, and the folder of its model."""
    found = [Path(s.model), *data.places(s.the_task(), s.data, s.eval_data)]
    if s.task.endswith(description.ENDINGS):
        found.append(Path(s.task))
    yield from (path for path in found if path.exists())


def check(
    path: Path | None,
    option: str = "--json",
    reads: Iterable[Path] = (),
    out: Path | None = None,
) -> None:
    """Refuses, before anything is computed, a file that an answer could not or must not replace.

    Args:
        path: Where the answer is to go; None: nowhere.
        option: The option that names it.
        reads: Files and folders that the command reads, all of them there.
        out: The folder of the run to come.

    Raises:
        InputError: Saying what to do.
    """
    if path is None:
        return
    files.check_writable(path, option)
    if run := folder.holder(path, out):
        raise InputError(f"{option} {path} is a file of the run in {run}; name another.")
    for source in reads if path.exists() else ():
        # Of a run's folder its own files are meant, and those are refused above.
        inside = source.resolve() in path.resolve().parents and not folder.is_run(source)
        if inside or path.samefile(source):
            raise InputError(f"{option} {path} is a file that this command reads; name another.")
