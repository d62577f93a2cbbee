"""The tables of whole steps, from ``bench/results/step.csv``; ``bench/steps.sh`` measures them."""

from __future__ import annotations

from bench.document import Row, table

MODES = ("on_entry", "paired", "in_place")
PEERS = {
    "mezo": "MeZO, as published",
    "torchzero": "torchzero's MeZO",
    "fo-sgd": "SGD, by backpropagation",
    "fo-adamw": "AdamW, by backpropagation",
}
_CASE = ("scheme", "loss", "rows", "length", "dtype", "queries", "dist", "lazy_logits")


def tables(rows: list[Row]) -> str:
    """Steps as multiples of two plain forwards, where their time goes, and the peers'."""
    first = rows[0]
    caption = (
        f"{first['machine']}, {first['threads']} threads; Python {first['python']}, torch "
        f"{first['torch']}; {first['model']} with random weights; commits "
        f"{', '.join(dict.fromkeys(row['commit'] for row in rows))}, {first['date']}; "
        f"GOMP_SPINCOUNT={first['spin']}. Multiples of two plain forwards, medians, and quartiles "
        "in brackets. A case that was measured again has its last row here."
    )
    return "\n\n".join([caption, _steps(rows), _parts(rows), _peers(rows)])


def _latest(rows: list[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """The last row of each case and mode."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in _CASE), {})[row["perturb"]] = row
    return found


def _steps(rows: list[Row]) -> str:
    lines = [
        (_name(case), case[4], *(_cell(modes.get(mode)) for mode in MODES))
        for case, modes in _latest(rows).items()
    ]
    return table(("step", "type", *MODES), lines, "llrrr")


def _parts(rows: list[Row]) -> str:
    lines = [
        (_name(case), case[4], mode, row["forwards"], row["noise"], row["update"], row["rest"],
         row["memory_mb"])
        for case, modes in _latest(rows).items()
        for mode, row in modes.items()
        if case[0] == "full" and case[5] == "1" and case[6] == "gaussian"
    ]  # fmt: skip
    head = ("step", "type", "mode", "forwards", "noise", "update", "rest", "MiB beyond forwards")
    return table(head, lines, "lllrrrrr")


def _peers(rows: list[Row]) -> str:
    measured = [row for row in rows if row["mezo"]]
    lines = []
    for name, title in PEERS.items():
        for row in measured:
            if row[name]:
                same = _latest(rows)[tuple(row[key] for key in _CASE)]
                ratios = [
                    f"{float(row[name]) / float(same[mode]['ratio']):.1f}"
                    for mode in ("on_entry", "paired")
                ]
                lines.append((title, row["dtype"], row[name], *ratios))
    head = ("peer", "type", "two forwards", "times on_entry's step", "times paired's step")
    return table(head, lines, "llrrr")


def _name(case: tuple[str, ...]) -> str:
    scheme, loss, rows, length, _, queries, dist, lazy = case
    parts = [f"{rows} × {length}"]
    parts += ["LoRA"] if scheme == "lora" else []
    parts += ["loss of two candidates"] if loss == "candidates" else []
    parts += [dist] if dist != "gaussian" else []
    parts += [f"{queries} queries"] if queries != "1" else []
    parts += ["whole logits"] if lazy == "False" else []
    return ", ".join(parts)


def _cell(row: Row | None) -> str:
    return f"{row['ratio']} ({row['low']}–{row['high']})" if row else "–"
