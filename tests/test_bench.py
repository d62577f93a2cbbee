"""What the benchmarks' own commands promise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import document, quickstart
from zokernels.cli import main

ROOT = Path(__file__).parent.parent


def test_the_documents_tables_are_those_of_the_results():
    command = [sys.executable, "-m", "bench.table", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_bench_codegen_writes_what_it_counts(tmp_path, capsys):
    pytest.importorskip("triton", reason="needs triton: pip install triton (Linux)")
    out, rows = tmp_path / "out.json", tmp_path / "out.csv"
    assert main(["bench", "codegen", "--sm", "90", "--json", str(out), "--csv", str(rows)]) == 0
    found = json.loads(out.read_text())["codegen"]
    assert {row["sm"] for row in found} == {90} and len(found) == 18
    assert all(row["spills"] == 0 and row["fusible"] == 0 for row in found)
    assert len(rows.read_text().splitlines()) == 19
    assert "add_noise" in capsys.readouterr().out


def test_bench_codegen_refuses_a_json_it_could_not_write(tmp_path, capsys):
    assert main(["bench", "codegen", "--json", str(tmp_path / "none" / "out.json")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_quickstart_measured_again_replaces_its_row_and_moves_the_mean(tmp_path):
    path = tmp_path / "rows.csv"
    common = dict.fromkeys(quickstart.COLUMNS, "1") | {"settings": "quickstart"}
    for seed, after in ((4, 0.5), (0, 0.75), (4, 0.77)):
        quickstart.keep({**common, "seed": seed, "dev_after": after}, path)
    rows = document.read_rows(path)
    assert [row["seed"] for row in rows] == ["0", "4"]
    assert "| 75.0 / 77.0 | 76.0 | 1.4 |" in quickstart.table(rows)
