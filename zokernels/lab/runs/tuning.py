"""The learning rate of a run, by a probe before its first step."""

from __future__ import annotations

from collections.abc import Callable

import zokernels as zk
from zokernels.lab import files
from zokernels.lab.errors import InputError, RunError
from zokernels.lab.runs import folder, out_of_memory
from zokernels.lab.runs.history import with_error
from zokernels.lab.runs.settings import Settings
from zokernels.lab.runs.state import Run
from zokernels.lab.tasks import batches

# The probe's batches come in another order than the run's, which is that of its seed.
_APART = 1 << 40
_SYMBOLS = {"‖g‖²": "squared_gradient", "E[d²]": "mean_square", "h": "curvature"}
# What a run keeps of a probe, besides ‖g‖² and h.
_KEPT = (
    "forwards", "eps_range", "loss", "mean_square", "largest_rate", "best_rate", "steps", "rate",
)  # fmt: skip


def probe(run: Run, forwards: int, by: str | None, told: Callable[[int, int], None]) -> zk.Probe:
    """Probes a run that is prepared.

    Args:
        run: The run, before its first step.
        forwards: How many there may be.
        by: The groups of parameters: "group", "layer" or None.
        told: Gets the forwards so far and in all.

    Raises:
        InputError: If the forwards do not suffice, or the optimizer or the model can't be probed.
        RunError: If memory ran out, or a loss was not finite.
    """
    s = run.settings
    drawn = batches.independent(run.pool, s.batch_size, seed=s.seed + _APART, balanced=s.balanced)
    try:
        return zk.probe(
            run.optimizer,
            run.scorer.loss,
            map(run.scorer.collate, drawn),
            forwards=forwards,
            groups=by,
            steps=s.steps,
            progress=told,
        )
    except FloatingPointError as error:
        raise RunError(str(error)) from None
    except ValueError as error:
        raise InputError(str(error)) from None
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory.is_out(error):
            raise
        raise RunError(
            f"Memory ran out in a forward of the probe, on a batch of {s.batch_size} "
            f"({out_of_memory.first_line(error)}); lower --batch-size or --max-length."
        ) from error


def choose(run: Run) -> None:
    """Puts the rate that a probe advises into the run's settings, or the one that it took before.

    Raises:
        InputError: If none can be advised.
        RunError: As `probe`.
    """
    s = run.settings
    earlier = files.read_json(s.out / folder.CONFIG) if run.resume else None
    if isinstance(earlier, dict) and earlier.get("tuned"):
        s.lr, s.tuned = earlier["lr"], earlier["tuned"]
        return
    run.watcher.say(f"Probing for --lr auto, by up to {s.probe_forwards:,} forwards.")
    found = probe(run, s.probe_forwards, None, run.watcher.probing)
    if found.rate is None:
        more = ", or more --probe-forwards" if found.more_forwards else ""
        raise InputError(
            f"--lr auto: no rate is advised after {found.forwards:,} forwards: "
            f"{(found.why or '').removesuffix('.')}. Or give --lr a number{more}."
        )
    plain = found.plain()
    whole = {name: plain["whole"][name] for name in ("squared_gradient", "curvature")}
    s.lr = float(f"{found.rate.value:.2g}")
    s.tuned = {**{name: plain[name] for name in _KEPT}, **whole}
    run.watcher.say(f"{sentence(s)}.")


def sentence(s: Settings) -> str:
    """Which rate a run takes by its probe, and why; without its full stop."""
    assert s.tuned is not None
    best = s.tuned["best_rate"]
    numbers = ", ".join(f"{symbol} = {_number(s.tuned[name])}" for symbol, name in _SYMBOLS.items())
    return (
        f"lr {s.lr:g} by a probe of {s.tuned['forwards']:,} forwards: now {_number(best)} lowers "
        f"the loss fastest, and less where the noise of {s.tuned['steps']:,} steps carries the "
        f"weights, with {numbers}"
    )


def _number(plain: dict[str, float]) -> str:
    return with_error(plain["value"], plain["error"])
