"""Ctrl-C during a run, or a SIGTERM, by which clusters and services end a process."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_on_interrupt(stopped: threading.Event) -> Iterator[None]:
    """The signal asks for a stop between steps; a second one ends the process at once."""

    def ask(number: int, frame: Any) -> None:
        stopped.set()
        for each in _SIGNALS:
            signal.signal(each, signal.default_int_handler)

    with _handled(ask, _SIGNALS):
        yield


@contextmanager
def raised_by_sigterm() -> Iterator[None]:
    """A SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    with _handled(signal.default_int_handler, (signal.SIGTERM,)):
        yield


@contextmanager
def _handled(handler: Callable[..., Any], numbers: Iterable[int]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
