"""The fine-tuned model from its base and the run's log, and the check that it is the saved one."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import zokernels as zk
from zokernels.lab import files
from zokernels.lab.errors import InputError, RunError
from zokernels.lab.runs import folder, learner, lock, optimizers
from zokernels.lab.runs.resume import read_settings
from zokernels.lab.runs.settings import Settings


def rebuild(
    base: str,
    run: Path,
    out: Path | None = None,
    *,
    until: int | None = None,
    verify: bool = False,
    device: str = "cpu",
    backend: str | None = None,
) -> dict[str, Any]:
    """Replays a run onto its base model.

    Args:
        base: The model that the run began with, by a name that `loading.load` takes.
        run: A run folder, or a trajectory file.
        out: Where the model goes; a new or empty folder.
        until: Number of steps; those of the run's saved weights by default, or all.
        verify: Compare with the weights that the run saved.
        device: Where to replay.
        backend: As for `zokernels.ops.add_noise_`.

    Returns:
        What was done, in plain values.

    Raises:
        InputError: If something given cannot be used; nothing is written then.
        RunError: If the replayed weights are not the saved ones, or ``out`` cannot be written.
    """
    path = run / folder.TRAJECTORY if run.is_dir() else run
    saved = run / folder.WEIGHTS
    _check(run, out, verify)
    began = time.perf_counter()
    try:
        trajectory = zk.Trajectory(path)
        if until is None:
            # Of a finished run the step whose weights it saved.
            until = (files.read_json(run / folder.METRICS) or {}).get("weights_of_step")
        until = trajectory.until(until)
        made = learner.load(_settings(trajectory, base, device))
        zk.replay(made.model, path, until, backend=backend)
    except (ValueError, RuntimeError) as error:
        raise InputError(str(error)) from None
    replayed = trajectory.steps[: until - trajectory.header["first"]]
    found = {
        "base": base,
        "trajectory": str(path),
        "optimizer": trajectory.header["optimizer"],
        "recorded_steps": trajectory.end,
        "steps": until,
        "skipped_steps": sum(s.passes is None for s in replayed),
        "torn_bytes": trajectory.torn,
        "bytes": path.stat().st_size,
        "weights": made.trained.weights,
        "out": str(out) if out else None,
        "verified": None,
    }
    if out is not None:
        try:
            with lock.FolderLock(out, "replay"):
                _check_new(out)
                files.write_folder(out, made.save)
        except OSError as error:
            raise RunError(f"--out {out} could not be written: {error.strerror}.") from None
    if verify:
        with tempfile.TemporaryDirectory() as scratch:
            made.save(Path(scratch))
            _compare(Path(scratch), saved, until)
        found["verified"] = True
    found["seconds"] = round(time.perf_counter() - began, 3)
    return found


def _check(run: Path, out: Path | None, verify: bool) -> None:
    if not run.exists():
        raise InputError(f"There is no run {run}; name a run folder or a trajectory file.")
    if run.is_dir() and folder.is_run(run):
        used = read_settings(run).optimizer
        if not optimizers.find(used).replayable:
            raise InputError(
                f"{run} went by {used}, whose gradients by backpropagation no log of scalars can "
                f"make again; its weights are in {run / folder.WEIGHTS}."
            )
    if run.is_dir() and not (run / folder.TRAJECTORY).exists():
        raise InputError(f"{run} has no {folder.TRAJECTORY}, so it is not the folder of a run.")
    if verify and not (run / folder.WEIGHTS).is_dir():
        raise InputError(
            f"--verify compares with the weights in {run / folder.WEIGHTS}, which is not there; "
            "name the folder of a finished run."
        )
    if out is None and not verify:
        raise InputError("--out is missing: name a new folder for the model, or pass --verify.")
    if out is not None:
        _check_new(out)


def _check_new(out: Path) -> None:
    if out.exists() and not (out.is_dir() and folder.is_empty(out)):
        raise InputError(f"--out {out} exists and is not empty; name a new folder.")


def _settings(trajectory: zk.Trajectory, base: str, device: str) -> Settings:
    """The settings that load the model as the run did."""
    nowhere = Path("unused")
    about = trajectory.header["about"].get("settings")
    if about is not None:
        settings = Settings.of(about, trajectory.path, nowhere)
        settings.model, settings.device = base, device
        return settings
    # Recorded by an optimizer in someone's own script: a plain model, in the type it had.
    dtypes = {p["dtype"] for p in trajectory.header["parameters"]}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    return Settings(model=base, out=nowhere, dtype=dtype, device=device)


def _compare(made: Path, saved: Path, step: int) -> None:
    """Raises unless both folders hold the same tensors, bit for bit."""
    ours, theirs = dict(_tensors(made)), dict(_tensors(saved))
    for name in sorted({*ours, *theirs}):
        if name not in ours or name not in theirs:
            where = saved if name in theirs else "the replayed model"
            raise RunError(f"Not verified: tensor {name!r} is in {where} only.")
        a, b = ours[name], theirs[name]
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(_bits(a), _bits(b)):
            raise RunError(
                f"Not verified: tensor {name!r} in {saved} is not what the log gives after step "
                f"{step}; the weights or the log were changed after the run."
            )


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise InputError(f"{path} has no safetensors file to compare with.")
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    yield name, opened.get_tensor(name)
        except SafetensorError as error:
            raise RunError(f"Not verified: {file} is damaged ({error}).") from None


def _bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)
