"""The tables of docs/optimizers.md: what each optimizer does and costs, in theory and counted.

``python -m bench.optimizers`` counts anew, into bench/results/optimizers.csv, and writes the
tables; with ``--check`` it exits with 1 if either would change. To add an optimizer, add an
`Entry` to `ENTRIES`.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zokernels as zk
from bench import costs, document

PAGE = document.ROOT / "docs" / "optimizers.md"
RESULTS = document.RESULTS / "optimizers.csv"
QUERIES, WINDOW, HYBRID = 3, 32, 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KEYS = ("optimizer", "dtype", "queries", "two_sided")
COLUMNS = (*KEYS, *(f"{f.name}{kind}" for f in fields(costs.Cost) for kind in ("", "_theory")))

# Peak memory holds some small tensors too: losses, buffers of seeds, a layer's activations.
SLACK = 0.02


@dataclass(frozen=True)
class Linear:
    """a·q + b, to be computed and to be read."""

    a: int
    b: int = 0

    def __call__(self, q: int) -> int:
        return self.a * q + self.b

    def __str__(self) -> str:
        first = f"{self.a if self.a > 1 else ''}q" if self.a else ""
        return " + ".join(x for x in (first, str(self.b) if self.b or not first else "") if x)


TWICE, ONCE, ONE_MORE = Linear(2), Linear(1), Linear(1, 1)


@dataclass(frozen=True)
class Entry:
    """A line of the tables: an optimizer, what theory says of it, and how ZO-Bench's code differs.

    Pairs are (two-sided, one-sided). ``temporary`` and ``state`` are in units of the weights;
    ``numbers`` is how many numbers a weight the state keeps, of ``state_bytes`` each.
    """

    name: str
    rule: str
    make: Callable[..., torch.optim.Optimizer]
    zo_bench: str
    forwards: tuple[Linear, Linear] = (TWICE, ONE_MORE)
    perturbing: tuple[Linear, Linear] = (TWICE, ONCE)
    updating: int = 1
    directions: Linear = ONCE
    numbers: int = 0
    state_bytes: int = 4
    temporary: float = 1 / costs.LAYERS
    temporary_is: str = "largest layer"
    warmup: int = 2
    # Of the weights that go by zeroth order, and so of the passes over them.
    share: float = 1.0
    slack: float = SLACK

    def theory(self, dtype: torch.dtype, q: int, two_sided: bool) -> costs.Cost:
        side = 0 if two_sided else 1
        return costs.Cost(
            forwards=self.forwards[side](q),
            perturbing=self.perturbing[side](q) * self.share,
            updating=self.updating * self.share,
            directions=self.directions(q) * self.share,
            state=self.numbers * self.state_bytes / dtype.itemsize,
            temporary=self.temporary,
        )

    def measured(self, dtype: torch.dtype, q: int, two_sided: bool) -> costs.Cost:
        def build(net: nn.Module) -> torch.optim.Optimizer:
            return self.make(net, lr=1e-7, num_queries=q, two_sided=two_sided)

        return costs.measure(build, dtype, self.warmup)


def _with(optimizer: Callable, **keywords: object) -> Callable[..., torch.optim.Optimizer]:
    return functools.partial(optimizer, **keywords)


def _forward_grad(net: nn.Module, lr: float, num_queries: int, two_sided: bool) -> zk.ForwardGrad:
    # A derivative has no sides.
    return zk.ForwardGrad(net, lr=lr, num_queries=num_queries)


def _hybrid(net: nn.Module, **options: Any) -> zk.HybridZO:
    return zk.HybridZO(net, HYBRID, functools.partial(torch.optim.SGD, lr=1e-7), **options)


NOT_THERE = "not there"
MOMENTUM = "m ← βm + ĝ; θ ← θ − ηm"
MOMENTS = "m ← β₁m + (1−β₁)ĝ; v ← β₂v + (1−β₂)ĝ²; "
HALF = dict(state_dtype=torch.bfloat16)
IN_PLACE = "adds +ε, −2ε, +ε to the weights, which does not restore 16-bit ones; "
ADAMW = "runs on AdamW as shipped, with two more copies of the model"
ENTRIES = [
    Entry(
        "ZOSGD", "θ ← θ − ηĝ", zk.ZOSGD,
        IN_PLACE + "with q > 1 it stores whole gradients, 1 × the weights",
    ),
    Entry(
        'ZOSGD(perturb="in_place")', "the same", _with(zk.ZOSGD, perturb="in_place"),
        "restores by the opposite perturbation, not from a copy",
        temporary=1.0, temporary_is="1",
    ),
    Entry(
        "ZOSGD(sparsity=0.2)", "the same where a random mask is 1", _with(zk.ZOSGD, sparsity=0.2),
        "keeps where N(0, 1) < ratio: “20 %” prunes 58 %; the update ignores the mask for q > 1",
    ),
    Entry(
        "ZOSGDSign", "θ ← θ − η sign(ĝ)", zk.ZOSGDSign,
        f"takes sign(d)·z, whose elements are no signs; {ADAMW}",
    ),
    Entry(
        "ZOSGDConservative", "of θ, θ − ηĝ, θ + ηĝ the one of lowest loss", zk.ZOSGDConservative,
        ADAMW,
        forwards=(Linear(2, 3), Linear(1, 3)), perturbing=(Linear(2, 2), Linear(1, 2)),
    ),
    Entry("ZOSGDMomentum", MOMENTUM, zk.ZOSGDMomentum, "as for `ZOSGD`", numbers=1),
    Entry(
        "ZOSGDMomentum(state_dtype=torch.bfloat16)", "the same", _with(zk.ZOSGDMomentum, **HALF),
        NOT_THERE, numbers=1, state_bytes=2,
    ),
    Entry(
        "ZOSGDMomentum(window=True)", "θ ← θ − η Σ βʲĝ_{t−j} over j < 32",
        _with(zk.ZOSGDMomentum, window=True), NOT_THERE,
        directions=Linear(WINDOW), warmup=WINDOW,
    ),
    Entry(
        "ZOAdam", MOMENTS + "v̂ ← max(v̂, v); θ ← θ − ηm/(√v̂ + ϵ)", zk.ZOAdam, "as for `ZOSGD`",
        numbers=3,
    ),
    Entry(
        "ZOAdam(amsgrad=False, bias_correction=True)",
        MOMENTS + "m̂ = m/(1−β₁ᵗ), v̂ = v/(1−β₂ᵗ); θ ← θ − ηm̂/(√v̂ + ϵ)",
        _with(zk.ZOAdam, amsgrad=False, bias_correction=True), "as for `ZOSGD`", numbers=2,
    ),
    Entry(
        "ZOAdam(state_dtype=torch.bfloat16)", "as `ZOAdam`", _with(zk.ZOAdam, **HALF), NOT_THERE,
        numbers=3, state_bytes=2,
    ),
    Entry(
        "ForwardGrad", "d = ∇L·z by forward-mode differentiation; θ ← θ − ηĝ", _forward_grad,
        "not compared",
        forwards=(ONCE, ONCE), perturbing=(ONCE, ONCE),
    ),
    Entry(
        "HybridZO(split=4)", "as `ZOSGD` for 4 of 12 layers, backpropagation for the rest", _hybrid,
        NOT_THERE,
        forwards=(Linear(2, 1), Linear(1, 2)), share=HYBRID / costs.LAYERS,
        # In bfloat16 a backward's products take up to a third of a layer more.
        temporary=1 - HYBRID / costs.LAYERS, temporary_is="deep gradients", slack=0.04,
    ),
]  # fmt: skip


def count(entries: list[Entry], queries: int = QUERIES) -> list[document.Row]:
    """One row for each optimizer, type of weights and kind of estimate."""
    rows = []
    for entry in entries:
        for name, dtype in DTYPES.items():
            for two_sided in (True, False):
                pair = (
                    entry.measured(dtype, queries, two_sided),
                    entry.theory(dtype, queries, two_sided),
                )
                values = (x for both in zip(*map(astuple, pair), strict=True) for x in both)
                keys = (entry.name, name, str(queries), str(two_sided))
                rows.append(dict(zip(COLUMNS, (*keys, *map(_text, values)), strict=True)))
    return rows


def _text(number: float) -> str:
    # Two decimals, so that activations and the like do not show.
    return f"{round(number, 2):g}"


def disagreements(rows: list[document.Row]) -> list[str]:
    """Sentences for what was counted and is not what theory says."""
    found = []
    slacks = {entry.name: entry.slack for entry in ENTRIES}
    for row in rows:
        for field in fields(costs.Cost):
            measured, theory = float(row[field.name]), float(row[f"{field.name}_theory"])
            slack = slacks[row["optimizer"]] if field.name == "temporary" else 0.0
            if abs(measured - theory) > slack:
                found.append(f"{row}: {field.name} is {measured}, theory says {theory}.")
    return found


def rules(entries: list[Entry]) -> str:
    """What each optimizer does, and what ZO-Bench's code does instead."""
    lines = [(f"`{entry.name}`", entry.rule, entry.zo_bench) for entry in entries]
    return document.table(("optimizer", "rule", "ZO-Bench's code"), lines)


def cost(entries: list[Entry], rows: list[document.Row]) -> str:
    """Theory, and after a colon what was counted."""

    def shared(theory: object, entry: Entry) -> str:
        return str(theory) if entry.share == 1 else f"{entry.share:.2f} × {theory}"

    lines = []
    for entry in entries:
        of = {(r["dtype"], r["two_sided"]): r for r in rows if r["optimizer"] == entry.name}
        two, one, half = of["float32", "True"], of["float32", "False"], of["bfloat16", "True"]
        lines.append(
            [
                f"`{entry.name}`",
                f"{entry.forwards[0]}: {two['forwards']}",
                f"{entry.forwards[1]}: {one['forwards']}",
                f"{shared(entry.perturbing[0], entry)}: {two['perturbing']}",
                f"{shared(entry.updating, entry)}: {two['updating']}",
                f"{shared(entry.directions, entry)}: {two['directions']}",
                f"{two['state_theory']}: {two['state']}",
                f"{half['state_theory']}: {half['state']}",
                f"{entry.temporary_is}: {two['temporary']}",
            ]
        )
    head = (
        "optimizer", "forwards", "one-sided", "perturbing passes", "updating passes",
        "directions in them", "state, float32 weights", "bfloat16 weights", "temporary",
    )  # fmt: skip
    return document.table(head, lines, "l" + "r" * 8)


def written(page: Path, rows: list[document.Row]) -> str:
    """The page with its tables made from the rows."""
    parts = {"bench:rules": rules(ENTRIES), "bench:costs": cost(ENTRIES, rows)}
    return document.replaced(page, parts)


def main(arguments: list[str] | None = None) -> int:
    """Count and write; with ``--check`` only compare.

    Returns:
        0 if rows and page are up to date now, 1 if a count is not what theory says or the check
        found them out of date.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.optimizers", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if anything would change")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    rows = count(ENTRIES)
    wrong = disagreements(rows)
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    page = written(options.page, rows)
    if options.check:
        same = document.read_rows(options.results) == rows
        same = same and page == options.page.read_text(encoding="utf-8")
        if not same:
            print("Out of date; run `python -m bench.optimizers`.", file=sys.stderr)
        return 0 if same and not wrong else 1
    if not wrong:
        document.write_rows(options.results, COLUMNS, rows)
        options.page.write_text(page, encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
