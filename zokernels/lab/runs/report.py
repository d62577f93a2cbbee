"""What a run leaves to read: its metrics, a plot and a short report."""

import importlib.util
import math
import platform
import time
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from zokernels.lab import files
from zokernels.lab.models.loading import KINDS
from zokernels.lab.runs import divergence, folder, hand_over, optimizers, signal, tuning
from zokernels.lab.runs.history import PARTS
from zokernels.lab.runs.settings import Settings
from zokernels.lab.runs.state import Run
from zokernels.lab.tasks import data
from zokernels.lab.tasks.metric import ACCURACY, METRICS

_PACKAGES = ("zokernels", "torch", "transformers", "peft", "triton")


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str | None]:
    """Python's version and those of the packages a run may use; None for an absent one."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def processor() -> str:
    """The CPU's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def write(run: Run) -> dict[str, Any]:
    """Writes plot, report and metrics into the run's folder; returns the metrics."""
    found = metrics(run)
    plot(run)
    files.write_text(run.out.path / folder.REPORT, text(run, found))
    # Last, since a run with metrics is finished.
    files.write_json(run.out.path / folder.METRICS, found)
    return found


def metrics(run: Run) -> dict[str, Any]:
    """What ``metrics.json`` holds."""
    s, history = run.settings, run.history
    stopped = run.stopped.is_set()
    # Of a run that did not end none was measured at its end.
    ends = history.dev if not (stopped or run.failure) else history.dev[:1]
    before = ends[0][1] if ends and ends[0][0] == 0 else None
    after = ends[-1][1] if ends and ends[-1][0] == run.done else None
    clock = history.seconds
    finite = [x for x in history.losses if math.isfinite(x)]
    return {
        "task": run.task.name,
        "metric": run.task.metric.name,
        "optimizer": optimizers.find(s.optimizer).__name__,
        "scheme": s.scheme,
        "template": s.template,
        "model": s.model,
        "kind": run.learner.loaded.kind,
        "data": run.splits.source,
        "steps": run.done,
        "seconds": round(time.perf_counter() - run.started, 2),
        "step_seconds": round(clock["total"], 3),
        "dev_accuracy_before": before.value if before else None,
        "dev_accuracy_after": after.value if after else None,
        "dev_standard_error_before": before.error if before else None,
        "dev_standard_error_after": after.error if after else None,
        "dev_examples": len(data.part(run.splits.dev, s.measured)),
        "mean_loss_first_tenth": _mean(finite[: max(1, len(finite) // 10)]),
        "mean_loss_last_tenth": _mean(finite[-max(1, len(finite) // 10) :]),
        "forwards": history.forwards,
        "backwards": history.backwards,
        "dev_majority": _majority(run),
        "non_finite_steps": len(history.losses) - len(finite),
        "halved_steps": history.halved,
        "trained_weights": run.learner.trained.weights,
        "all_weights": run.learner.trained.of,
        "share_outside_forwards": _share(clock["total"] - clock["forwards"], clock["total"]),
        "share_noise": _share(clock["noise"], clock["total"]),
        "share_update": _share(clock["update"], clock["total"]),
        "interrupted": stopped,
        "stopped_early": run.done < s.steps and not stopped and not run.failure,
        "failure": run.failure,
        "probe": s.tuned,
        "diverged": divergence.sentence(history.losses, before, after, run.task.metric, s.lr),
        "seed": s.seed,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "processes": run.processes.ranks,
        "machine": processor(),
        "weights_of_step": run.best[1] if run.best else run.done,
    }


def plot(run: Run) -> None:
    """Draws loss and accuracy against the step, where there is matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    history = run.history
    # Figure and its Agg canvas directly: pyplot would choose a backend for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    numbers = range(1, len(history.losses) + 1)
    upper.plot(numbers, history.losses, color="0.8", linewidth=0.7, label="each step")
    # An eighth of a short run to either side, so that its course is not smoothed away.
    reach = max(1, min(50, len(history.losses) // 8))
    label = f"mean of {2 * reach + 1} steps"
    upper.plot(numbers, smoothed(history.losses, reach), color="C0", label=label)
    upper.set_ylabel("training loss")
    upper.legend(loc="upper right", frameon=False)
    upper.set_title(f"{run.settings.title} on {run.task.name}", fontsize=10)
    scale = 100 if run.task.metric.share else 1
    for name, points in (("dev", history.dev), ("valid", history.valid)):
        if points:
            lower.errorbar(
                [step for step, _ in points],
                [scale * a.value for _, a in points],
                yerr=[scale * a.error for _, a in points],
                marker="o",
                capsize=3,
                label=f"{name} (± 1 standard error)",
            )
    lower.set_ylabel(run.task.metric.label)
    lower.set_xlabel("step")
    if history.dev or history.valid:
        where = "lower right" if run.task.metric.share else "upper right"
        lower.legend(loc=where, frameon=False)
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(run.out.path / folder.PLOT, dpi=150)


def smoothed(losses: list[float], reach: int) -> list[float]:
    """The mean of the steps around each; a loss that is not finite is passed over.

    A running mean of what came before begins with one step's loss, whose noise then looks like a
    jump of the run, and lags behind. Around a step there are at least ``reach`` others, at the ends
    of the run too.
    """
    out = []
    for place in range(len(losses)):
        around = losses[max(0, place - reach) : place + reach + 1]
        finite = [loss for loss in around if math.isfinite(loss)]
        out.append(math.fsum(finite) / len(finite) if finite else math.nan)
    return out


def text(run: Run, m: dict[str, Any]) -> str:
    """The report, in Markdown."""
    s, clock = run.settings, run.history.seconds
    per_step = 1000 / max(1, len(run.history.losses))
    split = " · ".join(
        f"{part} {clock[part] * per_step:.1f} ms ({_percent(clock[part], clock['total'])})"
        for part in PARTS
        if clock[part] or part == "forwards"
    )
    known = ", ".join(f"{name} {v}" for name, v in m["versions"].items() if v)
    # A bar would end the table's cell, and patterns are full of them.
    pattern = (s.train_only or "").replace("|", "\\|")
    words = ""
    if s.min_words or s.max_words:
        words = f", sentences of {s.min_words or 1} to {s.max_words or 'any number of'} words"
    picked = (
        f"the weights of step {run.best[1]}, picked on {len(run.splits.valid):,} other examples"
        if run.best
        else "the weights of the last step; none were picked"
    )
    early = ""
    if m["stopped_early"]:
        early = f" of {s.steps:,}, ended by --patience {s.patience}"
    rising = f" after {s.warmup:,} steps of rising" if s.warmup else ""
    plotted = (run.out.path / folder.PLOT).exists()
    lines = [
        f"# {s.title} on {run.task.name}",
        "",
        _verdict(m),
        "",
        *([f"**{m['diverged']}**", ""] if m["diverged"] else []),
        *([f"![Loss and accuracy]({folder.PLOT})", ""] if plotted else []),
        "| | |",
        "|---|---|",
        f"| Trained | {m['trained_weights']:,} of {m['all_weights']:,} weights"
        f" ({s.scheme}{', names matching `' + pattern + '`' if pattern else ''})"
        f" of `{s.model}`, scored as {KINDS[m['kind']]}, in {s.dtype} |",
        f"| Data | {run.splits.source}{words}; {_reported(run, m)} |",
        f"| Prompts | {_prompts(s)} |",
        f"| Result | {picked} |",
        f"| Method | {m['optimizer']}, {m['steps']:,} steps{early} of "
        f"{s.batch_size} examples"
        f"{' with equal class counts' if s.balanced else ''}, lr {s.lr:g} {s.schedule}{rising}, "
        f"{_method(s)}weight decay {s.weight_decay:g} |",
        *([f"| Rate | {tuning.sentence(s)} |"] if s.tuned else []),
        f"| Passes | {m['forwards']:,} forwards and {m['backwards']:,} backwards in training |",
        f"| Loss | {_number(m['mean_loss_first_tenth'])} over the first tenth of the steps, "
        f"{_number(m['mean_loss_last_tenth'])} over the last"
        f"; {m['non_finite_steps']} not finite |",
        f"| A step | {clock['total'] * per_step:.1f} ms: {split} |",
        f"| Time | {m['seconds']:.0f} s in all, {m['step_seconds']:.0f} s of it in steps |",
        f"| Seed | {s.seed} (order of the data, directions, adapter) |",
        f"| Machine | {processor()}, {_threads(run, m)}; {known} |",
        "",
    ]
    if told := signal.sentences(run.history, s):
        lines += [" ".join(told), ""]
    if run.learner.loaded.notes or run.splits.notes:
        lines += [*(f"- {note}" for note in (*run.splits.notes, *run.learner.loaded.notes)), ""]
    if s.save_weights:
        lines += ["What was trained is loaded by", "", "```python", hand_over.code(run), "```", ""]
    if run.command:
        lines += ["```", run.command, "```", ""]
    return "\n".join(lines)


def _threads(run: Run, m: dict[str, Any]) -> str:
    shared = run.processes.parallel
    if shared is None:
        return f"{m['threads']} threads"
    return (
        f"{shared.ranks} processes of {m['threads']} threads ({shared.data} shares of the batch, "
        f"{shared.query} of the directions; passes are those of one)"
    )


def _reported(run: Run, m: dict[str, Any]) -> str:
    whole, seen = len(run.splits.dev), m["dev_examples"]
    if not seen:
        return "nothing was evaluated"
    some = f"all {seen:,}" if seen == whole else f"{seen:,} of {whole:,}"
    return f"reported on {some} examples of dev"


def _method(s: Settings) -> str:
    plain = optimizers.key(s.optimizer)
    if plain in optimizers.FIRST_ORDER:
        return ""
    scale = "" if plain == optimizers.DERIVATIVES else f"ε {s.eps:g}{_moving(s)}, "
    own = (
        f"{scale}{s.num_queries} {s.dist} "
        f"direction{'s' * (s.num_queries > 1)} a step, {_estimate(s)}rounding to {s.rounding}, "
    )
    if plain == optimizers.HYBRID:
        own += (
            f"{s.hybrid_split} layers by zeroth order and the others by {s.fo_optimizer}, "
            f"lr {s.fo_lr:g}, "
        )
    return own


def _moving(s: Settings) -> str:
    way = "falling" if (s.eps_end or 0.0) <= s.eps else "rising"
    return "" if s.eps_end is None else f" {way} to {s.eps_end:g} ({s.eps_schedule})"


def _estimate(s: Settings) -> str:
    """How a step's slopes are made, where that is not by plain differences of both sides."""
    parts = []
    if s.estimator != "two_sided":
        parts.append(
            {
                "one_sided": "each compared with the loss at the weights themselves",
                "population": "each compared with the mean of all",
            }[s.estimator]
        )
    if s.normalize:
        by = {"std": "deviation", "ema": "running root mean square"}[s.normalize]
        parts.append(f"slopes over their {by}")
    if s.clip:
        parts.append(f"slopes cut at {s.clip:g} times their running root mean square")
    return "".join(f"{part}, " for part in parts)


def _majority(run: Run) -> float | None:
    """What always giving the most frequent answer of dev would reach."""
    dev = run.splits.dev
    if run.task.metric is not ACCURACY or not dev:
        return None
    return max(Counter(e.label for e in dev).values()) / len(dev)


def _prompts(s: Settings) -> str:
    parts = ["the task's template" if s.template else "no template"]
    if s.chat:
        parts.append("as a turn of a chat")
    if s.demos:
        parts.append(f"{s.demos} solved examples in context")
    if s.calibrate:
        parts.append("calibrated by a prompt without content")
    if s.objective:
        parts.append(f"objective {s.objective}")
    return ", ".join(parts)


def _verdict(m: dict[str, Any]) -> str:
    if m["failure"]:
        return f"The run failed after {m['steps']:,} steps: {m['failure']}"
    if m["interrupted"]:
        return (
            f"The run was interrupted after {m['steps']:,} steps; the weights are those of that "
            "moment and the dev split was not measured with them."
        )
    before, after = m["dev_accuracy_before"], m["dev_accuracy_after"]
    if before is None or after is None:
        return f"The run took {m['steps']:,} steps; nothing was evaluated (--eval-examples 0)."
    first, last = m["dev_standard_error_before"], m["dev_standard_error_after"]
    metric = METRICS[m["metric"]]
    return (
        f"Dev {metric.name} {metric.text(before, first)} before and "
        f"**{metric.text(after, last)}** after "
        f"(± one{' binomial' if metric is ACCURACY else ''} standard error)."
    )


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "–"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
