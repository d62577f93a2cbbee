"""Full checkpoints, for optimizers whose steps cannot be made again from a log of scalars.

One file, replaced whole: the trainable weights, the optimizer's state, and the best weights so far.
It is written at every evaluation during training and at an interruption; a killed run goes on from
the last of them, and does the steps behind it again, with the same bits.
"""

import os
from typing import Any

import torch

from zokernels.lab import files
from zokernels.lab.errors import InputError
from zokernels.lab.runs import folder
from zokernels.lab.runs.learner import Learner
from zokernels.lab.runs.state import Run

FORM = 1


def save(run: Run) -> None:
    """Writes the checkpoint of the last step, whole or not at all.

    Raises:
        OSError: If it could not be written; what was there before is there still.
    """
    path = run.out.path / folder.CHECKPOINT
    draft = path.with_name(f".{path.name}.new")
    held = {
        "form": FORM,
        "step": run.done,
        "pool": run.fingerprint,
        "names": _names(run.learner),
        "weights": [p.detach() for p in run.learner.parameters().values()],
        "optimizer": run.optimizer.state_dict(),
        "bad_steps": run.optimizer.bad_steps,
        "best": run.best,
    }
    try:
        torch.save(held, draft)
        files.sync(draft)
        os.replace(draft, path)
    except RuntimeError as error:
        # torch's writer has an error of its own for a full disk.
        raise OSError(0, str(error).splitlines()[0]) from error
    finally:
        draft.unlink(missing_ok=True)


def read(run: Run) -> dict[str, Any]:
    """The run's checkpoint: its "step", the fingerprint of its "pool", and what `restore` wants.

    Raises:
        InputError: If it cannot be read.
    """
    path = run.out.path / folder.CHECKPOINT
    try:
        held = torch.load(path, map_location=run.settings.device, weights_only=True)
        assert held["form"] == FORM
    except Exception as error:
        raise InputError(
            f"--resume {run.out.path}: {path.name} cannot be read ({type(error).__name__}); "
            "remove it and resume, to begin at step 1."
        ) from None
    return held


def restore(run: Run, held: dict[str, Any]) -> None:
    """Brings weights and optimizer back to a checkpoint.

    Raises:
        InputError: If the model is not that of the run.
    """
    if held["names"] != _names(run.learner):
        raise InputError(
            f"--resume {run.out.path}: the model's trainable parameters are not those of the run; "
            "bring the model back, or start a new run."
        )
    rates = [group["lr"] for group in _groups(run.optimizer)]
    run.learner.put(held["weights"])
    run.optimizer.load_state_dict(held["optimizer"])
    run.optimizer.bad_steps, run.best = held["bad_steps"], held["best"]
    # A schedule counts from the rate that it finds.
    for group, rate in zip(_groups(run.optimizer), rates, strict=True):
        group["lr"] = rate
        group.pop("initial_lr", None)


def _names(learner: Learner) -> list[str]:
    return [f"{n} {list(p.shape)} {p.dtype}" for n, p in learner.parameters().items()]


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    deep = getattr(optimizer, "fo_optimizer", None)
    return [*optimizer.param_groups, *(deep.param_groups if deep else ())]
