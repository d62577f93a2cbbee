"""Dev accuracy against forwards, from study.csv and quickstart.csv."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.report.tables.study import SCHEMES, TASKS, task
from zokernels.lab.benchmarks import results, style
from zokernels.lab.benchmarks.results import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Parts of the study that compare optimizers; the others vary one thing of these.
PARTS = ("minilm", "stories")
QUICKSTART_MODEL = "all-MiniLM-L6-v2"


@dataclass
class Panel:
    """Accuracies in percent of one model and scheme.

    Attributes:
        model: Its name.
        task: What it is to do.
        scheme: What was trained.
        before: Before training.
        majority: Of always the most frequent answer, or None where it was not written down.
        points: By optimizer the forwards of a run, and the accuracies over the seeds.
    """

    model: str
    task: str
    scheme: str
    before: float
    majority: float | None
    points: dict[str, tuple[int, list[float]]] = field(default_factory=dict)


def draw(figure: Figure, study: Sequence[Row], quickstart: Sequence[Row]) -> None:
    """A row a model, a panel a scheme; squares go by backpropagation, filled: several seeds.

    Raises:
        ValueError: If no row is of those parts.
    """
    used = [row for row in study if row["part"] in PARTS]
    if not used:
        raise ValueError(f"no row is of the parts {', '.join(PARTS)}")
    # Not of what its settings replaced.
    shown = [row for row in quickstart if row["settings"] == "quickstart"]
    panels = [*_study(used), *_quickstart(shown)]
    groups = dict.fromkeys((panel.model, panel.task) for panel in panels)
    lines = [[p for p in panels if (p.model, p.task) == group] for group in groups]
    columns = max(map(len, lines))
    figure.set_size_inches(style.WIDTH, 1.5 + 2.35 * len(lines))
    grid = figure.subplots(len(lines), columns, sharex=True, sharey=True, squeeze=False)
    most = max(forwards for panel in panels for forwards, _ in panel.points.values())
    for axes_line, line in zip(grid, lines, strict=True):
        for axes, panel in zip(axes_line, line, strict=False):
            _panel(axes, panel)
            axes.set_xlim(190, most * 1.5)
        for axes in axes_line[len(line) :]:
            axes.set_axis_off()
        axes_line[0].set_ylabel(f"{line[0].model}\n{line[0].task} accuracy (%)")
    # One scale, and a wide one, so that a point more or less does not look like a difference.
    low, high = grid[0][0].get_ylim()
    grid[0][0].set_ylim(min(low, 45), max(high, 90))
    style.frame(
        figure, "Accuracy against forwards",
        "All dev examples, weights of the last step. Mean ± sample standard deviation over "
        "seeds; open marker: one seed. Squares (FO) also take a backward a forward. Points of "
        "equal forwards stand side by side. Dashed: before training; dotted: always the most "
        f"frequent answer. Study: {results.caption(used)}. Quickstart: "
        f"{results.caption(shown)}.",
        _legend(panels), columns=4,
    )  # fmt: skip


def _study(rows: Sequence[Row]) -> list[Panel]:
    found: dict[tuple[str, str, str], Panel] = {}
    for row in sorted(rows, key=lambda r: (PARTS.index(r["part"]), SCHEMES.index(r["scheme"]))):
        before, majority = (float(row[k]) * 100 for k in ("dev_accuracy_before", "dev_majority"))
        key = (row["part"], row["task"], row["scheme"])
        panel = Panel(row["model"], task(row), row["scheme"], before, majority)
        panel = found.setdefault(key, panel)
        _, values = panel.points.setdefault(row["optimizer"], (int(row["forwards"]), []))
        values.append(100 * float(row["dev_accuracy_after"]))
    return list(found.values())


def _quickstart(rows: Sequence[Row]) -> list[Panel]:
    if not rows:
        return []
    after = [100 * float(row["dev_after"]) for row in rows]
    before = 100 * float(rows[0]["dev_before"])
    points = {"zo-sgd": (int(rows[0]["forwards"]), after)}
    return [Panel(QUICKSTART_MODEL, TASKS["sst2"], "quickstart", before, None, points)]


def _panel(axes: Any, panel: Panel) -> None:
    places = _side_by_side({name: forwards for name, (forwards, _) in panel.points.items()})
    axes.axhline(panel.before, color=style.FAINT, linewidth=1, linestyle=(0, (5, 3)), zorder=1)
    if panel.majority is not None:
        axes.axhline(panel.majority, color=style.FAINT, linewidth=1, linestyle=":", zorder=1)
    for name, (_, values) in panel.points.items():
        _, color, marker = style.OPTIMIZERS[name]
        several = len(values) > 1
        axes.errorbar(
            places[name], statistics.fmean(values), fmt=marker, color=color, markersize=6.5,
            yerr=statistics.stdev(values) if several else None, capsize=2.5, elinewidth=1.2,
            markerfacecolor=color if several else "white", markeredgewidth=1.3,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks([300, 600, 1500, 3000], ["300", "600", "1.5k", "3k"])
    axes.minorticks_off()
    axes.tick_params(labelbottom=True)
    axes.set_title(panel.scheme)
    axes.set_xlabel("forwards")


def _side_by_side(forwards: dict[str, int]) -> dict[str, float]:
    """Places on a logarithmic axis, of equal numbers a few per cent apart."""
    places = {}
    for number in set(forwards.values()):
        names = [name for name in style.OPTIMIZERS if forwards.get(name) == number]
        for i, name in enumerate(names):
            places[name] = number * 1.22 ** (i - (len(names) - 1) / 2)
    return places


def _legend(panels: Sequence[Panel]) -> list[Any]:
    from matplotlib.lines import Line2D

    seen = {name for panel in panels for name in panel.points}
    return [
        Line2D([], [], color=color, marker=marker, linestyle="none", markersize=6.5, label=label)
        for name, (label, color, marker) in style.OPTIMIZERS.items()
        if name in seen
    ]
