"""``zokernels bench codegen``: what the compiler makes of the Triton kernels."""

import time
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console

from zokernels import noise
from zokernels.lab.benchmarks import forecast, machine, plots
from zokernels.lab.cli import inputs, show
from zokernels.lab.cli.bench import output
from zokernels.lab.errors import InputError

# The compiler's output does not depend on the machine.
_ABOUT = ("date", "commit", "tests")
COLUMNS = (
    *_ABOUT, "triton", "sm", "case", "instructions_per_weight", "instructions_per_further_seed",
    "elements_per_thread", "narrowest_store_bits", "registers", "spills", "stack", "shared",
    "fused", "fusible", "bytes_per_weight",
)  # fmt: skip
_DTYPES = ("bfloat16", "float16", "float32")


def command(
    sm: Annotated[list[int] | None, typer.Option(help="Architectures, as 90 for sm_90.")] = None,
    csv_file: output.CSV = None,
    json: output.JSON = None,
    plot: output.PLOT = None,
) -> int:
    """Compile the Triton kernels, without a GPU, and count their machine instructions."""
    out = output.Output(csv_file, json, plot, COLUMNS, _ABOUT)
    inputs.check_needs("bench codegen", "triton")
    import triton

    from zokernels.lab.benchmarks.instruments import codegen as compiler

    if compiler.INTERPRETED:
        raise InputError("TRITON_INTERPRET is set, so nothing is compiled; unset it.")
    about = {name: machine.about()[name] for name in _ABOUT}
    wanted = [(capability, case) for capability in sm or (80, 90, 100) for case in _cases(compiler)]
    rows, expected = output.Rows(out, "codegen"), forecast.Forecast([1.0] * len(wanted))
    with output.Bar() as bar, rows.until_interrupted():
        task = bar.task("Compiling", len(wanted))
        for capability, case in wanted:
            began = time.perf_counter()
            rows.add(about | _row(triton.__version__, capability, case, compiler))
            expected.done(time.perf_counter() - began)
            if len(rows.all) == 1:
                bar.say(
                    f"{len(wanted)} kernels, {forecast.words(expected.left)} by the time of the "
                    "first; Ctrl-C keeps those that are there."
                )
            task.advance()
            task.show(left=expected.left)
    _show(rows.all)
    output.say_tests(str(about["tests"]))
    return rows.finish(lambda: plots.codegen(rows.all))


def _cases(compiler: Any) -> list[Any]:
    kinds = [("add_noise", dist) for dist in noise.KINDS]
    kinds += [(rule, "gaussian") for rule in ("sign", "momentum", "adam", "amsgrad")]
    kinds += [(rule, "rank1") for rule in ("sign", "momentum", "adam")]
    return [compiler.Case(op, dtype, dist) for op, dist in kinds for dtype in _DTYPES]


def _row(version: str, capability: int, case: Any, compiler: Any) -> dict[str, Any]:
    code = compiler.count_case(case, capability)
    counts = asdict(code)
    return {
        "triton": version,
        "sm": capability,
        "case": str(case),
        "instructions_per_weight": f"{code.per_weight:.2f}",
        "instructions_per_further_seed": f"{code.per_seed:.2f}",
        "elements_per_thread": code.elements,
        "narrowest_store_bits": min(code.stores),
        **{name: counts[name] for name in ("registers", "spills", "stack", "shared", "fused")},
        "fusible": code.fusible,
        "bytes_per_weight": code.bytes_per_weight,
    }


def _show(rows: list[dict[str, Any]]) -> None:
    shown = {
        "sm": show.Column("sm", key=True), "case": show.key("kernel"),
        "instructions_per_weight": show.Column("weight"),
        "instructions_per_further_seed": show.Column("seed"),
        "registers": show.Column("registers"), "spills": show.Column("spills"),
        "narrowest_store_bits": show.Column("stores"),
    }  # fmt: skip
    show.table(
        Console(),
        list(shown.values()),
        [[str(row[name]) for name in shown] for row in rows],
        title="Machine instructions: a weight, and a weight and further seed",
    )
