"""Full checkpoints, for optimizers whose steps cannot be made again from a log of scalars.

One file, replaced whole: the trainable weights, the optimizer's state, and the best weights so far.
It is written at every evaluation during training and at an interruption; a killed run goes on from
the last of them, and does the steps behind it again, with the same bits.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zokernels.lab.tasks import folder, resume
from zokernels.lab.tasks.errors import InputError

if TYPE_CHECKING:
    from zokernels.lab.tasks.run import Finetune

FORM = 1


def save(run: Finetune, optimizer: Any, path: Path, step: int, pool: int) -> None:
    """Writes the checkpoint of a step, whole or not at all.

    Args:
        run: The run.
        optimizer: Its optimizer.
        path: The file, replaced.
        step: Steps done.
        pool: The fingerprint of the training examples.

    Raises:
        OSError: If it could not be written; what was there before is there still.
    """
    draft = path.with_name(f".{path.name}.new")
    held = {
        "form": FORM,
        "step": step,
        "pool": pool,
        "names": _names(run),
        "weights": [p.detach() for p in run.trainable()],
        "optimizer": optimizer.state_dict(),
        "bad_steps": optimizer.bad_steps,
        "best": run.best,
    }
    try:
        torch.save(held, draft)
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except RuntimeError as error:
        # torch's writer has an error of its own for a full disk.
        raise OSError(0, str(error).splitlines()[0]) from error
    finally:
        draft.unlink(missing_ok=True)


def restore(run: Finetune, optimizer: Any, out: folder.RunFolder, pool: int) -> int:
    """Brings a run to its checkpoint, and returns the step.

    Raises:
        InputError: If the checkpoint, the model or the data are not those of the run.
    """
    path = out.path / folder.CHECKPOINT
    try:
        held = torch.load(path, map_location=run.settings.device, weights_only=True)
        assert held["form"] == FORM
    except Exception as error:
        raise InputError(
            f"--resume {out.path}: {path.name} cannot be read ({type(error).__name__}); remove it "
            "and resume, to begin at step 1."
        ) from None
    if held["pool"] != pool:
        raise InputError(resume.other_data(out.path))
    if held["names"] != _names(run):
        raise InputError(
            f"--resume {out.path}: the model's trainable parameters are not those of the run; "
            "bring the model back, or start a new run."
        )
    records, step = resume.whole_lines(out.path / folder.LOG), held["step"]
    logged = [r for r in records if "loss" in r]
    if len(logged) < step:
        raise InputError(
            f"--resume {out.path}: {folder.LOG} ends at step {len(logged)}, before the checkpoint "
            f"of step {step}; remove {path.name} and resume, to begin at step 1."
        )
    kept = [r for r in records if r["step"] < step or ("loss" in r and r["step"] == step)]
    rates = _rates(optimizer)
    with torch.no_grad():
        for p, saved in zip(run.trainable(), held["weights"], strict=True):
            p.copy_(saved)
    optimizer.load_state_dict(held["optimizer"])
    optimizer.bad_steps, run.best = held["bad_steps"], held["best"]
    # A schedule counts from the rate that it finds.
    for group, rate in zip(_groups(optimizer), rates, strict=True):
        group["lr"] = rate
        group.pop("initial_lr", None)
    resume.restore_history(run, kept)
    out.resume(kept)
    run.watcher.say(f"Resumed after step {step}.")
    return step


def _names(run: Finetune) -> list[str]:
    return [
        f"{n} {list(p.shape)} {p.dtype}" for n, p in run.model.named_parameters() if p.requires_grad
    ]


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    deep = getattr(optimizer, "fo_optimizer", None)
    return [*optimizer.param_groups, *(deep.param_groups if deep else ())]


def _rates(optimizer: Any) -> list[float]:
    return [group["lr"] for group in _groups(optimizer)]
