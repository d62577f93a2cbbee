"""What the benchmarks' own commands promise."""

import csv
import json
from pathlib import Path

import pytest

from bench.report.tables import quickstart as table
from bench.study import quickstart, stories
from zokernels.lab.benchmarks import results
from zokernels.lab.cli import main

ROOT = Path(__file__).parents[3]


def test_bench_codegen_writes_what_it_counts(tmp_path, capsys):
    triton = pytest.importorskip("triton", reason="needs triton: pip install triton (Linux)")
    out, rows, plot = (tmp_path / f"out.{kind}" for kind in ("json", "csv", "svg"))
    files = ["--json", str(out), "--csv", str(rows), "--plot", str(plot)]
    assert main(["bench", "codegen", "--sm", "90", *files]) == 0
    found = json.loads(out.read_text())["codegen"]
    assert {row["sm"] for row in found} == {90} and len(found) == 30
    assert all(row["fusible"] == 0 for row in found)
    # Registers of "sign" were limited by rows of Triton 3.6 on a GPU, and 3.7 needs more of them.
    spilled = {row["case"].partition(" ")[0] for row in found if row["spills"]}
    assert spilled == ({"sign"} if triton.__version__.startswith("3.7.") else set())
    assert len(rows.read_text().splitlines()) == 31
    assert "<svg" in plot.read_text()
    assert "add_noise" in capsys.readouterr().out


def test_bench_codegen_refuses_a_json_it_could_not_write(tmp_path, capsys):
    assert main(["bench", "codegen", "--json", str(tmp_path / "none" / "out.json")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.hf
def test_the_story_models_tokenizer_merges_by_score():
    letters = "abcdet "
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    joined = [" t", "he", " the", "ed", "ab", "abc", "bc", "cab"]
    pieces += [(word, -float(i)) for i, word in enumerate([*joined, *letters, "h"])]
    made = stories.tokenizer(pieces)
    for text in ("the ab cab", "abcabcabc", "hedthed", "dög the", "", "  the"):
        assert made(text)["input_ids"] == stories.reference(text, pieces), text
    assert made.decode(made("dög the")["input_ids"], skip_special_tokens=True) == "dög the"


def test_a_quickstart_measured_again_replaces_its_row_and_moves_the_mean(tmp_path):
    path = tmp_path / "rows.csv"
    common = dict.fromkeys(quickstart.COLUMNS, "1") | {"settings": "quickstart"}
    for seed, after in ((4, 0.5), (0, 0.75), (4, 0.77)):
        quickstart.keep({**common, "seed": seed, "dev_after": after}, path)
    rows = results.read(path)
    assert [row["seed"] for row in rows] == ["0", "4"]
    assert "| 75.0 / 77.0 | 76.0 | 1.4 |" in table.table(rows)


@pytest.fixture
def tiny():
    pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")
    return ["bench", "step", "--model", "opt-tiny", "--rows", "2", "--length", "8"]


def test_bench_step_writes_a_row_a_mode_beside_the_peers(tiny, tmp_path, capsys):
    out, rows, plot = (tmp_path / f"out.{kind}" for kind in ("json", "csv", "png"))
    options = ["--repeats", "4", "--loss", "candidates", "--csv", str(rows), "--json", str(out)]
    options += ["--plot", str(plot)]
    for dtype in ("float32", "bfloat16"):
        assert main([*tiny, "--dtype", dtype, *options]) == 0
    found = json.loads(out.read_text())["step"]
    assert [row["perturb"] for row in found] == ["on_entry", "paired"]
    assert all(float(found[0][peer]) > 0 for peer in ("mezo", "fo-sgd", "fo-adamw"))
    parts = [float(found[1][part]) for part in ("forwards", "noise", "update", "rest")]
    # Medians of parts need not add up to the median of the whole.
    assert sum(parts) == pytest.approx(float(found[1]["ratio"]), rel=0.5)
    with rows.open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["dtype"] for row in table] == ["float32"] * 2 + ["bfloat16"] * 2
    assert all(row["tests"] in ("passed", "failed", "not run") for row in table)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "MeZO, as published" in capsys.readouterr().out


def test_bench_step_without_peers_compares_with_none(tiny, tmp_path, capsys):
    rows = tmp_path / "rows.csv"
    assert main([*tiny, "--no-peers", "--repeats", "2", "--csv", str(rows)]) == 0
    assert "MeZO" not in capsys.readouterr().out
    with rows.open(newline="") as file:
        assert [row["perturb"] for row in csv.DictReader(file)] == ["on_entry", "paired"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "opt-9"], "--model must be one of"),
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--perturb", "twice"], "--perturb must be one of"),
        (["--perturb", "graphed_paired"], "graphed_paired captures a CUDA graph; give --device"),
        (["--loss", "none"], "--loss must be one of"),
        (["--device", "tpu"], "--device must be cpu"),
        (["--length", "4000"], "reads at most"),
        (["--scheme", "none"], "--scheme must be one of"),
        (["--optimizer", "none"], "--optimizer must be one of"),
        (["--csv", "none/rows.csv"], "its folder does not exist"),
        (["--csv", "pyproject.toml"], "other columns"),
    ],
)
def test_bench_step_refuses_before_it_measures(tiny, options, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main([*tiny, *options]) == 2
    assert message in capsys.readouterr().err
