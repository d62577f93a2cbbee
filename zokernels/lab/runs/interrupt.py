"""Ctrl-C during a run, or a SIGTERM, by which clusters and services end a process."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_on_interrupt(stopped: threading.Event) -> Iterator[None]:
    """The signal asks for a stop between steps; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Callable[..., Any] | int | None] = {
        number: signal.getsignal(number) for number in _SIGNALS
    }

    def ask(number: int, frame: Any) -> None:
        stopped.set()
        for each in _SIGNALS:
            signal.signal(each, signal.default_int_handler)

    for each in _SIGNALS:
        signal.signal(each, ask)
    try:
        yield
    finally:
        for known, handler in before.items():
            signal.signal(known, handler)
