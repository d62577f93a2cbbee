"""A run's numbers in TensorBoard, Weights & Biases, MLflow, Trackio: whatever accelerate knows.

Nothing of them is imported unless it is asked for.
"""

from __future__ import annotations

import math
import os
from typing import Any

from zokernels.lab import files
from zokernels.lab.errors import InputError
from zokernels.lab.runs import folder
from zokernels.lab.runs.history import Watcher
from zokernels.lab.runs.settings import Settings

PROJECT = "zokernels"
_PACKAGES = {"tensorboard": "'zokernels[trackers]'", "comet_ml": "comet-ml"}


class Trackers:
    """Those that a run reports to.

    Args:
        settings: Of the run.
        watcher: Is told if one of them fails, which does not end the run.
        first: Whether this process is the one that reports.

    Raises:
        InputError: If one is unknown or not installed.
    """

    def __init__(self, settings: Settings, watcher: Watcher, first: bool = True) -> None:
        self.settings = settings
        self.watcher = watcher
        self.names = [n.strip() for n in (settings.report_to or "").split(",") if n.strip()]
        self._accelerator: Any = None
        if self.names:
            self._check()
        if not first:
            self.names = []

    def _check(self) -> None:
        try:
            from accelerate import tracking  # type: ignore[import-untyped]
        except ImportError:
            raise InputError(
                "--report-to needs accelerate, which is not installed: pip install 'zokernels[hf]'."
            ) from None
        there = {str(getattr(t, "value", t)) for t in tracking.get_available_trackers()}
        for name in self.names:
            if name not in tracking.LOGGER_TYPE_TO_CLASS:
                raise InputError(
                    f"--report-to takes {', '.join(tracking.LOGGER_TYPE_TO_CLASS)}, with commas; "
                    f"got '{name}'."
                )
            if name not in there:
                raise InputError(
                    f"--report-to {name} needs a package that is not installed: "
                    f"pip install {_PACKAGES.get(name, name)}."
                )

    def begin(self) -> None:
        """Opens them, as the run begins or goes on."""
        if not self.names:
            return
        from accelerate import Accelerator
        from accelerate.utils import ProjectConfiguration  # type: ignore[import-untyped]

        out = self.settings.out
        places = ProjectConfiguration(str(out), logging_dir=str(out / folder.EVENTS))
        plain = {k: v for k, v in self.settings.plain().items() if v is not None}
        config = {k: v if isinstance(v, int | float | str) else str(v) for k, v in plain.items()}
        own = {"wandb": {"name": out.name, "dir": str(out)}, "trackio": {"name": out.name}}
        if "mlflow" in self.names:
            # Its own place, unless the environment names another.
            own["mlflow"] = {"run_name": out.name}
            os.environ.setdefault(
                "MLFLOW_TRACKING_URI", f"sqlite:///{(out / 'mlflow.db').absolute()}"
            )
        self._accelerator = Accelerator(
            log_with=list(self.names), project_config=places, cpu=self.settings.device == "cpu"
        )
        try:
            self._accelerator.init_trackers(
                PROJECT, config, {n: k for n, k in own.items() if n in self.names}
            )
        except Exception as error:
            self._give_up(error)

    def log(self, record: dict[str, Any]) -> None:
        """Reports a line of the run's log."""
        if self._accelerator is None:
            return
        try:
            self._accelerator.log(numbers(files.finite(record)), step=record["step"])
        # A service that is away is no reason to lose a run.
        except Exception as error:
            self._give_up(error)

    def end(self) -> None:
        """Closes them."""
        if self._accelerator is None:
            return
        try:
            self._accelerator.end_training()
        except Exception as error:
            self._give_up(error)
        self._accelerator = None

    def _give_up(self, error: Exception) -> None:
        self._accelerator = None
        self.watcher.say(
            f"--report-to {','.join(self.names)} stopped ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); the run goes on, and its numbers are in its folder."
        )


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """What is reported of a line of the run's log."""
    if "loss" not in record:
        value = record["value"]
        return {} if value is None else {f"{record['split']}/{record['metric']}": value}
    found = {
        "train/loss": record["loss"],
        "train/lr": record["lr"],
        "train/outside_forwards": record["outside_forwards"],
        "train/seconds": record["seconds"],
        "train/forwards": record["forwards"],
    }
    slopes = [d for d in record["projected_gradients"] if d is not None]
    if slopes:
        # Of several their root mean square: their signs are those of directions.
        root = math.sqrt(sum(d * d for d in slopes) / len(slopes))
        found["train/projected_gradient"] = slopes[0] if len(slopes) == 1 else root
    return {name: value for name, value in found.items() if value is not None}
