"""Long benchmarks say how long they take, keep rows as they come, and leave them to a Ctrl-C."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import needs_native

from zokernels.lab.benchmarks import forecast, ops, step, timing
from zokernels.lab.cli import main
from zokernels.lab.cli.bench import all as everything
from zokernels.lab.cli.bench import output
from zokernels.lab.errors import RunError


def interrupt_at(number, run):
    """`run`, but a Ctrl-C in place of its call of that number."""
    calls = []

    def counted(*given, **options):
        calls.append(given)
        if len(calls) == number:
            raise KeyboardInterrupt
        return run(*given, **options)

    return counted


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def files(folder):
    return ["--csv", str(folder / "a.csv"), "--json", str(folder / "a.json")]


@pytest.fixture
def memory(monkeypatch):
    pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")
    from zokernels.lab.benchmarks import memory, models

    small = models.config("opt-125m")
    small.num_hidden_layers, small.vocab_size = 2, 512
    monkeypatch.setattr(models, "config", lambda name: small)
    memory._theory.cache_clear()
    yield memory
    memory._theory.cache_clear()


def cells(*more):
    named = ["--optimizer", "inference", "--optimizer", "zo-sgd", "--length", "16"]
    return ["bench", "memory", *named, "--length", "32", *more]


@pytest.mark.hf
def test_memory_says_how_long_and_keeps_each_row_at_once(memory, tmp_path, monkeypatch, capsys):
    kept = []

    def run(cell):
        kept.append(len(rows(tmp_path / "a.csv")) if (tmp_path / "a.csv").exists() else 0)
        return {"source": "measured", "peak": 3 << 20, "seconds": 0.5}

    monkeypatch.setattr(memory, "run", run)
    assert main(cells(*files(tmp_path))) == 0
    assert kept == [0, 1, 2, 3]
    said = capsys.readouterr().err
    assert "4 of 4 cells to measure, each in a process of its own: about" in said
    assert "zo-sgd, 4 × 32 tokens: 0.00 GiB, measured" in said


@pytest.mark.hf
def test_memory_interrupted_keeps_its_rows_and_says_so(memory, tmp_path, monkeypatch, capsys):
    found = {"source": "measured", "peak": 3 << 20, "seconds": 0.5}
    monkeypatch.setattr(memory, "run", interrupt_at(3, lambda cell: found))
    assert main(cells(*files(tmp_path))) == 130
    assert [r["length"] for r in rows(tmp_path / "a.csv")] == ["16", "32"]
    assert len(json.loads((tmp_path / "a.json").read_text())["memory"]) == 2
    said = capsys.readouterr()
    assert "Interrupted; what was measured before is kept in" in said.err and "2 rows" in said.err
    assert "inference" in said.out


@pytest.mark.hf
def test_interrupted_before_the_first_row_there_is_nothing(memory, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.json").write_text("old")
    monkeypatch.setattr(memory, "run", interrupt_at(1, None))
    assert main(cells(*files(tmp_path))) == 130
    assert "before there was anything to keep" in capsys.readouterr().err
    assert (tmp_path / "a.json").read_text() == "old" and not (tmp_path / "a.csv").exists()


@pytest.mark.hf
def test_what_is_not_started_is_not_guessed_to_take_time(memory, monkeypatch):
    from zokernels.lab.benchmarks.instruments.footprint import Cell

    small, large = Cell("opt-125m", "zo-sgd", 1, 16), Cell("opt-125m", "zo-sgd", 4, 64)
    assert memory.guess(small, 1e-9) < memory.guess(large, 1e-9)
    assert memory.guess(small, 1e-9) < memory.guess(Cell("opt-125m", "fo-sgd", 1, 16), 1e-9)
    monkeypatch.setattr(memory, "fits", lambda theory, device: False)
    assert memory.guess(large, 1e-9) == 0


def of_a_step(mode, forwards):
    case = step.Case(perturb=mode)
    parts = dict(forwards=1.0, noise=0.1, update=0.1, rest=0.01)
    return step.row(case, step.Result(forwards, 130.0, 1.21, 1.1, 1.3, parts, 1000, 128, 5.0, 3))


@pytest.fixture
def two_steps(monkeypatch):
    """A step a mode, the second 's plain forwards slower; nothing is run."""
    pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")
    found = iter([of_a_step("on_entry", 101.5), of_a_step("paired", 234.5)])
    monkeypatch.setattr(step, "measure", lambda case, repeats, done: [done() for _ in range(3)])
    monkeypatch.setattr(step, "row", lambda case, result: next(found))
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.hf
def test_each_column_of_a_step_has_its_own_forwards(two_steps, capsys):
    assert main(["bench", "step", "--no-peers", "--repeats", "3"]) == 0
    said = capsys.readouterr()
    (line,) = (line for line in said.out.splitlines() if "│ of 2 plain forwards" in line)
    assert line.index("101.5") < line.index("234.5")
    assert "101.5 ms" not in said.out
    assert "3 repetitions, about 5 seconds by the time of one" in said.err
    assert "1 more of --perturb after it" in said.err


@pytest.mark.hf
def test_a_step_on_a_loaded_machine_says_so(two_steps, monkeypatch, capsys):
    loads = iter([(0.0, 0.0), (5.0, 10.0)])
    monkeypatch.setattr(timing, "busy", lambda: next(loads))
    assert main(["bench", "step", "--no-peers", "--repeats", "3"]) == 0
    assert "other processes had 50% of its CPU time" in capsys.readouterr().err


@pytest.mark.hf
def test_a_step_interrupted_keeps_the_modes_before(two_steps, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "measure", interrupt_at(2, lambda *given: None))
    assert main(["bench", "step", "--no-peers", *files(tmp_path)]) == 130
    assert [r["perturb"] for r in rows(tmp_path / "a.csv")] == ["on_entry"]


def test_every_bar_of_a_steps_plot_has_its_number():
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    from zokernels.lab.benchmarks import plots

    graphed = of_a_step("graphed_paired", 100.0) | dict.fromkeys(step.PARTS, "")
    beside = {"mezo": "7.25", "fo-sgd": "2.50"}
    found = [graphed | {"ratio": "1.07"}, of_a_step("on_entry", 100.0) | beside]
    figure = plots.step(found)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert [t.get_text().strip() for t in axes.texts] == ["1.07", "1.21", "7.25", "2.50"]
    ends = [t.get_window_extent().x1 for t in axes.texts]
    assert max(ends) <= axes.get_window_extent().x1
    legend = [t.get_text() for t in axes.get_legend().get_texts()]
    assert legend == ["step", "forwards", "noise", "update", "rest"]


@needs_native
def test_passes_interrupted_have_the_repetitions_before(tmp_path, monkeypatch, capsys):
    plan = ops.Plan(numel=1000, dtypes=("float32",))
    number = len(ops.cases(plan))

    # What takes long is repeated less; here all take the same.
    def clock(run, device="cpu"):
        run()
        return 1e-4

    # One of each to schedule, two whole repetitions, and a bit of the third.
    monkeypatch.setattr(timing, "clock", interrupt_at(3 * number + 2, clock))
    assert main(["bench", "ops", "--numel", "1000", "--dtype", "float32", *files(tmp_path)]) == 130
    found = rows(tmp_path / "a.csv")
    assert [r["repeats"] for r in found] == ["2"] * number
    said = capsys.readouterr().err
    assert "The repetitions take about" in said and "Interrupted" in said


def test_kernels_interrupted_keep_those_that_are_compiled(tmp_path, monkeypatch, capsys):
    pytest.importorskip("triton", reason="needs triton: pip install triton (Linux)")
    from zokernels.lab.benchmarks.instruments import codegen

    monkeypatch.setattr(codegen, "INTERPRETED", False)
    monkeypatch.setattr(codegen, "count_case", interrupt_at(3, codegen.count_case))
    assert main(["bench", "codegen", "--sm", "90", *files(tmp_path)]) == 130
    assert len(rows(tmp_path / "a.csv")) == 2
    assert "kernels, about" in capsys.readouterr().err


def test_what_a_full_disk_refused_is_written_with_the_next_row(tmp_path, monkeypatch):
    out = output.Output(tmp_path / "a.csv", None, None, ("a",))
    kept, append = output.Rows(out, "x"), output.results.append

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.results, "append", full)
    kept.add({"a": 1})
    monkeypatch.setattr(output.results, "append", append)
    kept.add({"a": 2})
    assert [r["a"] for r in rows(tmp_path / "a.csv")] == ["1", "2"]
    assert kept.finish(lambda: None) == 0
    kept.add({"a": 3})
    monkeypatch.setattr(output.results, "append", full)
    kept.add({"a": 4})
    with pytest.raises(RunError, match="a.csv could not be written: No space left on device"):
        kept.finish(lambda: None)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_bench_all_lets_an_interrupted_command_write_its_rows(tmp_path):
    code = (
        "import signal, sys, time\n"
        "from pathlib import Path\n"
        "place = Path(sys.argv[1])\n"
        "try:\n    place.with_suffix('.on').touch(); time.sleep(60)\n"
        "except KeyboardInterrupt: time.sleep(1); place.write_text('kept')\n"
    )
    run = (
        "import signal, sys, zokernels.lab.cli.bench.all as a, os\n"
        # A shell's background job, which these tests may be, ignores it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "a._process([sys.executable, '-c', *sys.argv[1:]], 60, dict(os.environ))\n"
    )
    place = tmp_path / "rows"
    whole = [sys.executable, "-c", run, code, str(place)]
    env = everything.machine.environment()
    with subprocess.Popen(
        whole, start_new_session=True, env=env, stderr=subprocess.PIPE
    ) as process:
        while not place.with_suffix(".on").exists():
            assert process.poll() is None
            time.sleep(0.05)
        # As a terminal's Ctrl-C reaches both.
        os.killpg(process.pid, signal.SIGINT)
        assert b"KeyboardInterrupt" in process.communicate(timeout=60)[1]
    assert place.read_text() == "kept"


def test_a_forecast_learns_from_what_was_done():
    expected = forecast.Forecast([1.0, 2.0, 3.0])
    assert expected.left == 6.0
    expected.done(2.0)
    assert expected.left == 10.0
    expected.done(2.5)
    assert expected.left == 4.5
    expected.done(1.0)
    assert expected.left == 0.0


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(1, "about 5 seconds"), (42, "about 40 seconds"), (119, "about 2 minutes"),
     (1140, "about 19 minutes"), (9000, "about 2.5 hours")],
)  # fmt: skip
def test_a_time_is_said_no_more_exactly_than_it_is_known(seconds, said):
    assert forecast.words(seconds) == said


def test_a_product_takes_some_time():
    assert 0 < forecast.seconds_of_a_product(torch.float32, "cpu") < 1e-6
