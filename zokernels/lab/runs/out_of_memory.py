"""A batch that does not fit in memory, in two halves: one step, with the same mean for its loss."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from zokernels.lab.scoring.scorer import Scorer
from zokernels.lab.tasks.task import Example

T = TypeVar("T")

# What allocators other than CUDA's say; none of them has an exception class of its own.
_SENTENCES = ("not enough memory", "can't allocate memory", "bad_alloc", "out of memory")


def is_out(error: BaseException) -> bool:
    """Whether an exception says that memory, of the device or the machine, did not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and says_out(str(error))


def says_out(text: str) -> bool:
    """Whether an error's text is an allocator's that had no more."""
    return any(sentence in text.lower() for sentence in _SENTENCES)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def take_step(
    optimizer: Any,
    scorer: Scorer,
    examples: Sequence[Example],
    retry: bool,
    seen: Callable[[torch.Tensor], None],
) -> tuple[float, bool]:
    """One optimizer step on a batch; where memory does not suffice, again and in two halves.

    Every forward of the second attempt runs both halves, so both sides of a difference see the
    same sums. The directions are those of the step, whichever attempt makes it.

    Args:
        optimizer: Its weights are as they were if this raises in a forward.
        scorer: Makes batches and losses; a loss is a mean over a batch's examples.
        examples: At least one.
        retry: Whether to try again.
        seen: Called with the loss of every forward.

    Returns:
        The step's loss, and whether it was made in halves.
    """
    try:
        return float(_step(optimizer, scorer, [examples], seen)), False
    except (RuntimeError, MemoryError) as error:
        if not (retry and len(examples) > 1 and is_out(error)):
            raise
        # A block-wise step that has updated a block can't be taken again.
        if optimizer.projected_gradients:
            raise
    # Out here the traceback is gone, and with it what its frames held.
    _free()
    return float(_step(optimizer, scorer, _halves(examples), seen)), True


def in_parts(run: Callable[[Sequence[Example]], list[T]], examples: Sequence[Example]) -> list[T]:
    """``run(examples)``, or, while memory does not suffice, that of the halves one after the other.

    Args:
        run: Gives a value for each example.
        examples: At least one.
    """
    try:
        return run(examples)
    except (RuntimeError, MemoryError) as error:
        if len(examples) == 1 or not is_out(error):
            raise
    _free()
    return [value for half in _halves(examples) for value in in_parts(run, half)]


def _halves(examples: Sequence[Example]) -> list[Sequence[Example]]:
    """The examples in two, the larger half first."""
    middle = (len(examples) + 1) // 2
    return [examples[:middle], examples[middle:]]


def _step(
    optimizer: Any,
    scorer: Scorer,
    parts: Sequence[Sequence[Example]],
    seen: Callable[[torch.Tensor], None],
) -> torch.Tensor:
    batches = [scorer.collate(part) for part in parts]
    # Of differences of losses the examples' spread is told; a backward starts at their mean.
    each = hasattr(optimizer, "signal")

    def closure() -> torch.Tensor:
        losses = torch.cat([scorer.losses(batch) for batch in batches])
        seen(losses)
        return losses if each else losses.mean()

    return optimizer.step(closure)


def _free() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
