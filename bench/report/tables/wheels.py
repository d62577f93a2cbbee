"""In which environments an installed wheel was verified, from wheels.csv."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report import document
from zokernels.lab.benchmarks import results
from zokernels.lab.benchmarks.results import Row


def table(rows: Sequence[Row]) -> str:
    """A line an environment; one that was verified again is its last row."""
    last = {(r["python"], r["torch"], r["libc"]): r for r in rows}
    lines = [
        (r["python"], r["torch"], r["libc"], r["instruction_sets"].replace(" ", ", "),
         f"`{r['openmp']}`", _cases(r))
        for r in sorted(last.values(), key=lambda r: (_numbers(r["python"]), _numbers(r["torch"])))
    ]  # fmt: skip
    wheels = ", ".join(f"`{name}`" for name in results.distinct(rows, "wheel"))
    compilers = ", ".join(results.distinct(rows, "built_with"))
    said = [{k: v for k, v in r.items() if k not in ("python", "torch")} for r in rows]
    caption = f"{wheels}, built with {compilers}; {results.caption(said)}."
    head = ("Python", "torch", "C library", "kernels", "OpenMP", "`zokernels verify`")
    return caption + "\n\n" + document.table(head, lines)


def _cases(row: Row) -> str:
    passed, failed = int(row["passed"]), int(row["failed"])
    return f"**{failed} of {passed + failed:,} FAILED**" if failed else f"{passed:,} passed"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.partition("+")[0].split("."))
