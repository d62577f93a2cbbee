"""The peak memory of a step, from memory.csv."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report import document
from zokernels.lab.benchmarks import results
from zokernels.lab.benchmarks.peaks import GPU, NAMES
from zokernels.lab.benchmarks.results import Row

# What the README has of the two files: model, optimizers, and where a row stands.
_SHOWN = ("zo-sgd", "fo-sgd", "fo-adam")
_SIZES = (("opt-125m", 16, 64), ("opt-1.3b", 8, 2048), ("opt-13b", 16, 512))


def summary(rows: Sequence[Row], gpu: Sequence[Row]) -> str:
    """A step's memory beside that of backpropagation, for the README."""
    lines = []
    for model, batch, length in _SIZES:
        found = {
            row["optimizer"]: row
            for row in (*rows, *gpu)
            if row["model"] == model and _shape(row) == (batch, length) and _is_plain(row)
        }
        if not {*_SHOWN} <= {*found}:
            continue
        last = found[_SHOWN[0]]
        how = f"on {last['machine']}" if last["peak_mb"] else "by arithmetic"
        lines.append([
            f"{model.upper()}, {last['dtype']}, {batch} × {length:,} tokens, {how}",
            *(f"{float(found[o]['peak_mb'] or found[o]['theory_mb']) / 1024:.1f}" for o in _SHOWN),
        ])  # fmt: skip
    head = ["GiB in a step of all weights", *(NAMES[name] for name in _SHOWN)]
    return document.table(head, lines, "l" + "r" * len(_SHOWN))


def _is_plain(row: Row) -> bool:
    usual = row["perturb"] in ("", "on_entry") and row["points"] in ("", "2")
    return usual and row["dist"] in ("", "gaussian")


def measured(rows: Sequence[Row]) -> str:
    """What was measured on each machine, in MiB, with its multiple of what arithmetic says."""
    parts = []
    for (_, model, dtype), mine in results.grouped(rows, "machine", "model", "dtype").items():
        if all(row["source"] == "arithmetic" for row in mine):
            continue
        shapes = sorted({_shape(row) for row in mine})
        cells: dict[str, dict[tuple[int, int], str]] = {}
        for row in mine:
            cells.setdefault(_name(row), {})[_shape(row)] = _cell(row)
        lines = [[name, *(own.get(s, "–") for s in shapes)] for name, own in cells.items()]
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
    for (name,), own in results.grouped(here, "optimizer").items():
        cells = {int(row["length"]): row for row in own}
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


def _name(row: Row) -> str:
    """The optimizer, and what is unusual in how its forwards are perturbed."""
    parts = [NAMES[row["optimizer"]]]
    if row["perturb"] not in ("", "on_entry"):
        parts.append(f"`{row['perturb']}`")
    # Rows of before there was a choice have neither.
    if row["dist"] not in ("", "gaussian"):
        parts.append(row["dist"])
    if row["points"] not in ("", "2"):
        parts.append(f"{row['points']} points")
    return ", ".join(parts)


def _shape(row: Row) -> tuple[int, int]:
    return int(row["rows"]), int(row["length"])


def _cell(row: Row) -> str:
    if not row["peak_mb"]:
        return row["source"]
    peak, theory = float(row["peak_mb"]), float(row["theory_mb"])
    return f"{peak:,.0f} ({peak / theory:.2f})"
