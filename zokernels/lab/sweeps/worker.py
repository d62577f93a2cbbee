"""``python -m zokernels.lab.sweeps.worker``: a process that does one run after the other.

A line of JSON on stdin is a run's settings. What happens is told by lines of JSON on stdout; the
last one of a run has "status". The end of stdin, or of whoever reads stdout, stops the run at hand
between two steps, so that it can be resumed.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from zokernels.lab.errors import InputError, RunError
from zokernels.lab.files import json_of
from zokernels.lab.models.loading import quiet
from zokernels.lab.runs import folder
from zokernels.lab.runs.history import Watcher
from zokernels.lab.runs.run import Finetune
from zokernels.lab.runs.settings import Settings

_EVERY = 0.2


class Teller(Watcher):
    """Tells the steps of a run on a pipe, and stops the run when nobody listens."""

    def __init__(self, pipe: IO[str]) -> None:
        self.pipe = pipe
        self.run: Finetune | None = None
        self.closed = False
        self._told = 0.0

    def tell(self, **what: Any) -> None:
        """Writes a line."""
        try:
            print(json_of(what), file=self.pipe, flush=True)
        except OSError:
            self.close()

    def close(self) -> None:
        """Stops the run at hand, and every later one."""
        self.closed = True
        if self.run is not None:
            self.run.stopped.set()

    def step(self, number: int, loss: float, seconds: float, outside: float) -> None:
        """Tells a step, a few times a second."""
        now = time.monotonic()
        if now - self._told > _EVERY:
            self._told = now
            self.tell(step=number, loss=loss)


def serve(orders: IO[str], answers: IO[str]) -> None:
    """Does the runs that are ordered, until there are no more."""
    todo: queue.Queue[str | None] = queue.Queue()
    teller = Teller(answers)

    def listen() -> None:
        for line in orders:
            todo.put(line)
        teller.close()
        todo.put(None)

    threading.Thread(target=listen, daemon=True).start()
    while (line := todo.get()) is not None:
        teller.tell(**_do(json.loads(line), teller))
        teller.run = None
        # A model is full of cycles, and the next run has one of its own.
        gc.collect()


def _do(plain: dict[str, Any], teller: Teller) -> dict[str, Any]:
    out = Path(plain["out"])
    try:
        settings = Settings.of(plain, out, out)
        teller.run = Finetune(settings, teller, resume=folder.is_run(out))
        if teller.closed:
            teller.run.stopped.set()
        metrics = teller.run.run()
    except InputError as error:
        return {"status": "refused", "reason": str(error)}
    except RunError as error:
        return {"status": "failed", "reason": str(error)}
    except Exception as error:
        reason = " ".join(str(error).split())
        return {"status": "failed", "reason": f"{type(error).__name__}: {reason}"}
    return {"status": "interrupted" if metrics["interrupted"] else "finished"}


def main() -> None:
    """Keeps stdout for the answers, whatever a library prints."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    quiet()
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
