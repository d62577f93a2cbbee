"""What the benchmarks' own commands promise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import stories
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
