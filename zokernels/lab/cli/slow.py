"""Says where passes run in plain PyTorch because a device's kernels are missing."""

import functools

import zokernels as zk
from zokernels.lab.cli.show import say
from zokernels.lab.runs import optimizers
from zokernels.lab.runs.settings import Settings

# The warning of an optimizer's first step, which would say the same again.
OF_AN_OPTIMIZER = r"The weights are on .* Until then passes run in plain PyTorch"
_KERNELS = {"cpu": "native", "cuda": "triton"}


def say_slow(device: str, backend: str | None = None) -> None:
    """One sentence on stderr, once a process, where the reference stands in for kernels.

    Args:
        device: Where the passes are to run.
        backend: The one asked for by name, which does not fall back.
    """
    if backend is None and (sentence := of_slow(device)):
        _say_once(sentence)


def say_slow_run(settings: Settings) -> None:
    """The same of a run, unless it goes by backpropagation and has no passes."""
    if optimizers.key(settings.optimizer) not in optimizers.FIRST_ORDER:
        say_slow(settings.device, settings.backend)


def of_slow(device: str) -> str | None:
    """The sentence for a device; None if its kernels are there."""
    state = zk.backends().get(_KERNELS.get(device.partition(":")[0], ""))
    if state is None or state.available:
        return None
    return (
        f"This will be slow: {state.reason} Until then passes run in plain PyTorch, which has the "
        "same bits and takes many times as long."
    )


@functools.cache
def _say_once(sentence: str) -> None:
    say(sentence)
