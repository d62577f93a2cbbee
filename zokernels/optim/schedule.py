"""ε on a schedule: any of torch's learning-rate schedules, moving ``eps`` in the place of ``lr``.

The perturbation may fall as a run nears its end, where a smaller one is bent less by curvature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from zokernels.optim.base import ZOOptimizer


class EpsSchedule:
    """A schedule of an optimizer's ``eps``.

    Args:
        optimizer: Whose param groups it moves.
        schedule: One of `torch.optim.lr_scheduler`, or a function that makes one of an optimizer,
            whose learning rates are here the scales ε.
        **options: For ``schedule``.

    A run that is resumed needs its state, as it needs that of a schedule of the rate. Where ε is to
    stay above rounding, give the schedule an end: many of torch's go to 0, and `step` refuses an ε
    of 0.

    Raises:
        TypeError: If ``schedule`` makes no schedule of torch.

    Example:
        >>> falling = zk.EpsSchedule(opt, LinearLR, start_factor=1.0, end_factor=0.1)
        >>> loss = opt.step(closure)
        >>> falling.step()
    """

    def __init__(
        self, optimizer: ZOOptimizer, schedule: Callable[..., LRScheduler], **options: Any
    ):
        self.optimizer = optimizer
        self._scales = _Scales(optimizer)
        self.schedule = schedule(self._scales, **options)
        if not isinstance(self.schedule, LRScheduler):
            raise TypeError(
                f"schedule made a {type(self.schedule).__name__}, but it must be one of "
                "torch.optim.lr_scheduler, or a function that makes one: "
                "EpsSchedule(opt, CosineAnnealingLR, T_max=1000, eta_min=1e-4)."
            )
        self._hand_over()

    def step(self, *args: Any) -> None:
        """The next ε: after ``optimizer.step``, with the arguments that the schedule takes."""
        self._check_groups()
        self.schedule.step(*args)
        self._hand_over()

    def get_last_eps(self) -> list[float]:
        """ε of each param group."""
        return [float(group["lr"]) for group in self._scales.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The schedule's state, and ε, in plain values."""
        return {"schedule": self.schedule.state_dict(), "eps": self.get_last_eps()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; ε is what it was then.

        Raises:
            ValueError: If it is of other param groups.
        """
        self._check_groups(len(state_dict["eps"]))
        self.schedule.load_state_dict(state_dict["schedule"])
        for group, eps in zip(self._scales.param_groups, state_dict["eps"], strict=True):
            group["lr"] = eps
        self._hand_over()

    def _check_groups(self, saved: int | None = None) -> None:
        here = len(self.optimizer.param_groups)
        known = len(self._scales.param_groups) if saved is None else saved
        if here != known:
            raise ValueError(
                f"The schedule of eps is of {known} param groups, but the optimizer has {here}; "
                "make the schedule anew."
            )

    def _hand_over(self) -> None:
        for group, scale in zip(
            self.optimizer.param_groups, self._scales.param_groups, strict=True
        ):
            group["eps"] = float(scale["lr"])
            # Schedules that follow a metric have no place to begin at.
            if "initial_lr" in scale:
                group["initial_eps"] = float(scale["initial_lr"])


class _Scales(torch.optim.Optimizer):
    """What a schedule takes for an optimizer: a group for each, whose learning rate is ε."""

    def __init__(self, optimizer: ZOOptimizer):
        groups = [
            {"params": [torch.zeros(())], "lr": float(group["eps"])}
            for group in optimizer.param_groups
        ]
        # What a loaded optimizer began with, as torch's schedules look for it.
        for group, own in zip(groups, optimizer.param_groups, strict=True):
            if "initial_eps" in own:
                group["initial_lr"] = float(own["initial_eps"])
        super().__init__(groups, {})
        # Else a schedule warns that no step of this one came before its own.
        self._opt_called = True
