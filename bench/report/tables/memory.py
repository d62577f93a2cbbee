"""The peak memory of a step, from memory.csv."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report import document
from zokernels.lab.benchmarks import results
from zokernels.lab.benchmarks.peaks import GPU, NAMES
from zokernels.lab.benchmarks.results import Row


def measured(rows: Sequence[Row]) -> str:
    """What was measured, in MiB, with its multiple of what arithmetic says."""
    here = [row for row in rows if row["source"] == "measured"]
    parts = []
    for model, dtype in dict.fromkeys((row["model"], row["dtype"]) for row in here):
        mine = [row for row in here if (row["model"], row["dtype"]) == (model, dtype)]
        shapes = sorted({_shape(row) for row in mine})
        lines = []
        for name, perturb in dict.fromkeys((row["optimizer"], row["perturb"]) for row in mine):
            cells = {
                _shape(row): row
                for row in mine
                if (row["optimizer"], row["perturb"]) == (name, perturb)
            }
            way = "" if perturb in ("", "on_entry") else f", `{perturb}`"
            lines.append([f"{NAMES[name]}{way}", *(_cell(cells.get(shape)) for shape in shapes)])
        head = ["optimizer", *(f"{batch} × {length}" for batch, length in shapes)]
        parts += [
            f"**{model}, {dtype}**; {results.caption(mine)}. MiB, in brackets the multiple of the "
            "arithmetic.",
            document.table(head, lines, "l" + "r" * len(shapes)),
        ]
    return "\n\n".join(parts)


def arithmetic(rows: Sequence[Row]) -> str:
    """The paper's table: what no machine at hand holds, and how many GPUs hold it."""
    here = [row for row in rows if row["source"] == "arithmetic"]
    first = here[0]
    lengths = sorted({int(row["length"]) for row in here})
    lines = []
    for name in results.distinct(here, "optimizer"):
        cells = {int(row["length"]): row for row in here if row["optimizer"] == name}
        gib = [float(cells[length]["theory_mb"]) / 1024 for length in lengths]
        state = float(cells[lengths[0]]["state_mb"]) / 1024
        gpus = " / ".join(str(-int(-value // GPU)) for value in gib)
        lines.append([NAMES[name], *(f"{value:.1f}" for value in gib), f"{state:.1f}", gpus])
    head = ["optimizer", *(f"{first['rows']} × {n}, GiB" for n in lengths), "of it state"]
    caption = (
        f"**{first['model']}, {first['dtype']}, by arithmetic, not measured**; weights "
        f"{float(first['weights_mb']) / 1024:.1f} GiB; commit {first['commit']}, {first['date']}. "
        f"GPUs: how many of {GPU} GiB together hold it, at each length."
    )
    return f"{caption}\n\n{document.table([*head, 'GPUs'], lines, 'l' + 'r' * len(head))}"


def _shape(row: Row) -> tuple[int, int]:
    return int(row["rows"]), int(row["length"])


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    peak, theory = float(row["peak_mb"]), float(row["theory_mb"])
    return f"{peak:,.0f} ({peak / theory:.2f})"
