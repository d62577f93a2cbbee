"""The random numbers of the next forward: torch's on every device, Python's and NumPy's.

A generator that a model has made for itself is its own, and is not among them.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from typing import Any

import torch


class RandomState:
    """Where the generators of the process stand, to be set there again.

    Args:
        devices: The devices whose generators count, besides the CPU's.
    """

    def __init__(self, devices: Iterable[torch.device] = ()):
        self.devices = {on for on in devices if on.type == "cuda"}
        self._cpu = torch.get_rng_state()
        self._cuda = {on: torch.cuda.get_rng_state(on) for on in self.devices}
        self._python = random.getstate()
        # Who has not imported it draws nothing from it.
        self._numpy: Any = sys.modules.get("numpy")
        self._array = None if self._numpy is None else self._numpy.random.get_state()

    def restore(self) -> None:
        """Let the next forward draw what the one after this state was taken drew."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
        random.setstate(self._python)
        if self._numpy is not None:
            self._numpy.random.set_state(self._array)
