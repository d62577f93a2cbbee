"""Keeping torch.compile's tracer away from what is no operation of torch.

It can't see into a pass over memory: what it makes of Python code that handles addresses holds no
memory alive for them, and a perturbed weight is another one in each forward.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

_REASON = "zokernels passes over the weights' memory here, which is no operation of a graph"


def is_here() -> bool:
    """Whether the tracer is loaded, which takes seconds: without it nothing is compiled."""
    return "torch._dynamo" in sys.modules


def untraced(function: F) -> F:
    """The function as a break in a compiled graph: it runs as it is, and what it calls too."""
    hidden: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not is_here():
            return function(*args, **kwargs)
        if not hidden:
            hidden.append(torch.compiler.disable(function, reason=_REASON))
        return hidden[0](*args, **kwargs)

    return run  # type: ignore[return-value]


def eager() -> AbstractContextManager[None]:
    """Inside the block whatever was compiled runs as if it had not been."""
    return torch.compiler.set_stance("force_eager") if is_here() else contextlib.nullcontext()


def is_inside() -> bool:
    """Whether a caller of this function was handed to torch.compile."""
    if not is_here():
        return False
    wrappers = vars(sys.modules["torch._dynamo.eval_frame"])
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        # Those of `torch.compile` have a callback, those of `torch.compiler.disable` none.
        if frame.f_globals is wrappers and "fn" in frame.f_code.co_freevars:
            return "callback" in frame.f_code.co_freevars
        frame = frame.f_back
    return False
