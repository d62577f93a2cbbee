"""Tables on narrow terminals: no number, head or word is lost, and nothing goes beyond the edge."""

import io
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.text import Text
from tiny import environment

import zokernels as zk
from zokernels.lab.benchmarks import compare, results
from zokernels.lab.cli import env, show, tune, verify
from zokernels.lab.cli import presets as presets_command
from zokernels.lab.cli.bench import all as everything
from zokernels.lab.cli.bench import codegen, memory, ops, step
from zokernels.lab.cli.bench import compare as compare_command

ROOT = Path(__file__).resolve().parents[3]
WIDTHS = [100, 80, 60, 40]


def rows_of(name):
    return results.read(ROOT / "bench/results" / f"{name}.csv")


def printed(width, print_to):
    out = io.StringIO()
    print_to(Console(file=out, width=width, force_terminal=False))
    return out.getvalue()


def narrow(monkeypatch, modules, width, run):
    """What a command prints that makes its console itself."""
    out = io.StringIO()
    for module in modules:
        monkeypatch.setattr(module, "Console", lambda **_: Console(file=out, width=width))
    run()
    return out.getvalue()


def numbers(text):
    return re.findall(r"\d[\d.,]*", text)


class Number(SimpleNamespace):
    def __str__(self):
        return f"{self.value:.2e} ± 12 %"


def a_probe():
    number = Number(directions=64, value=9.87e-4)
    values = dict.fromkeys(("squared_gradient", "curvature", "mean_square", "fall"), number)
    labels = [f"layers[{i}].attention" for i in range(3)]
    parts = [SimpleNamespace(label=label, weights=7_087_872, **values) for label in labels]
    return SimpleNamespace(
        whole=SimpleNamespace(**values), loss=number, mean_square=number, best_rate=None,
        largest_rate=number, eps_range=None, ladder=(), eps=1e-3, parts=parts,
    )  # fmt: skip


def outcomes():
    case = lambda first, second: SimpleNamespace(group=(first, second))  # noqa: E731
    return [
        SimpleNamespace(
            case=case("native", f"add_noise in {dtype}"), seconds=12.25,
            failure="why" if dtype == "float16" else None, note="differs by 0.0012345 of 0.5",
        )
        for dtype in ("float32", "float16", "bfloat16")
    ]  # fmt: skip


def differences():
    return [
        compare.Difference(
            ("bfloat16", "add_noise_", "gaussian", variant, "native-avx512"),
            1.234, 1.357, 1.099, 1.051, 1.149, "slower",
        )
        for variant in ("", "stochastic")
    ]  # fmt: skip


def summary():
    lines = ["add_noise_ float32: 1.23 times its floor, 12.5 times as fast as torch", "and 27 more"]
    done = {"name": "step-rademacher", "outcome": "done", "seconds": 123.0, "lines": lines}
    return [done, {"name": "memory", "outcome": "failed", "seconds": 4567.0, "why": "exit code 1"}]


TABLES = {
    "ops": lambda c: ops.tables(c, rows_of("ops")[:60]),
    "step": lambda c: step._show(c, rows_of("step")[:4]),
    "compare": lambda c: compare_command.table(c, differences(), "main (0123abcde)", "4567fab"),
    "tune": lambda c: tune._show(a_probe(), c),
    "tune by part": lambda c: tune._show_parts(a_probe(), c),
    "verify": lambda c: verify._show(outcomes(), c),
    "presets": lambda c: presets_command.show(c),
}
# These make their console themselves.
OWN = {
    "codegen": (codegen, lambda: codegen._show(rows_of("codegen")[:30])),
    "memory": (memory, lambda: memory._show(rows_of("memory")[:30], 80.0)),
    "all": (everything, lambda: everything._show(summary(), Path("runs/bench"))),
    "env": (env, lambda: env.command()),
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", [*TABLES, *OWN])
def test_a_table_keeps_every_number_and_word_within_the_width(name, width, monkeypatch):
    kept = []

    def told(console, columns, rows, *more, **options):
        kept.append((columns, rows))
        table(console, columns, rows, *more, **options)

    table = show.table
    monkeypatch.setattr(show, "table", told)
    if name in TABLES:
        text = printed(width, TABLES[name])
    else:
        module, run = OWN[name]
        text = narrow(monkeypatch, [module], width, run)
    assert "…" not in text
    # A sentence is left to the terminal to break.
    lines = [line for line in text.splitlines() if line[:1] in "┏┃┡│├└"]
    assert kept and lines and all(len(line) <= width for line in lines)
    for columns, rows in kept:
        for place, column in enumerate(columns):
            # A long word may be broken, a number or a number's head nowhere.
            texts = [column.head, *(str(row[place]) for row in rows)]
            words = [w for t in texts for w in t.split() if len(w) <= (24 if width > 40 else 8)]
            whole = texts if column.number else words
            lost = {word for word in whole if word not in text}
            assert not lost, lost


def test_what_does_not_fit_goes_below_with_the_names_of_its_rows():
    columns = [show.key("name"), *(show.Column(f"number {i}") for i in range(5))]
    rows = [(name, *(f"{i}.{name}" for i in range(5))) for name in ("one", "two")]
    text = printed(40, lambda c: show.table(c, columns, rows, title="Title", caption="Caption"))
    assert text.count("name") == text.count("│ one") == text.count("│ two") == 3
    assert text.startswith("Title\n") and text.rstrip().endswith("Caption")
    wide = printed(90, lambda c: show.table(c, columns, rows))
    assert wide.count("name") == 1 and len(wide.splitlines()) == 6


def test_a_number_that_is_wider_than_the_terminal_is_whole():
    text = printed(
        20, lambda c: show.table(c, [show.key("a"), show.Column("b")], [("x", "1" * 30)])
    )
    assert "1" * 30 in text


def test_brackets_are_text_and_a_style_is_none():
    columns = [show.key("a"), show.Column("b")]
    text = printed(40, lambda c: show.table(c, columns, [("[bold]x", Text("3", style="red"))]))
    assert "[bold]x" in text and "│ 3 │" in text


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("command", [["finetune"], ["bench", "step"]])
def test_help_names_every_option_whole(command, width):
    done = subprocess.run(
        [sys.executable, "-m", "zokernels", *command, "--help"],
        capture_output=True, text=True, check=True, env=environment() | {"COLUMNS": str(width)},
    )  # fmt: skip
    assert "…" not in done.stdout
    assert "--eval-examples" in done.stdout or command != ["finetune"]
    assert max(map(len, done.stdout.splitlines())) <= width


def test_no_command_has_a_table_of_its_own():
    for path in (Path(zk.__file__).parent / "lab").rglob("*.py"):
        if path.name != "show.py":
            assert "rich.table" not in path.read_text(encoding="utf-8"), path
