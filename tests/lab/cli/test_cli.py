"""The command line as a user meets it: exit codes, sentences, and nothing overwritten."""

import json
import subprocess
import sys

import pytest
import torch
import typer
from tiny import build, environment

import zokernels as zk
from zokernels.backends import native
from zokernels.lab.benchmarks import timing
from zokernels.lab.cli import app, main
from zokernels.lab.cli import quickstart as quick

pytestmark = pytest.mark.hf


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(build("bert", tmp_path_factory.mktemp("models") / "bert"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with a good data folder and a few bad things."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("ZOKERNELS_DATA", raising=False)
    for name in ("data", "malformed", "empty"):
        (tmp_path / name).mkdir()
        rows = "".join(f"a {'good' if i % 2 else 'bad'} film \t{i % 2}\n" for i in range(20))
        (tmp_path / name / "train.tsv").write_text("sentence\tlabel\n" + rows)
        (tmp_path / name / "dev.tsv").write_text("sentence\tlabel\n" + rows)
    (tmp_path / "malformed/train.tsv").write_text("sentence\tlabel\ngood \t1\nno label\n")
    (tmp_path / "empty/dev.tsv").write_text("")
    (tmp_path / "not_a_run").mkdir()
    (tmp_path / "not_a_run/thesis.txt").write_text("years of work")
    (tmp_path / "a_run").mkdir()
    (tmp_path / "a_run/config.json").write_text('{"zokernels_run": 1}')
    (tmp_path / "a_file").write_text("x")
    (tmp_path / "old.json").write_text("kept")
    return tmp_path


def contents(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


BAD = [
    ("missing model", ["--model", "./gone"], "There is no model folder ./gone"),
    ("model not on hub", ["--model", "no/such-model"], "neither a folder nor"),
    ("folder without a model", ["--model", "data"], "has no config.json"),
    ("unknown task", ["--task", "sst3"], "no task 'sst3'; the tasks are: sst2"),
    ("no data folder", ["--data", "gone"], "--data gone is neither a file or folder here nor"),
    ("no data in it", ["--data", "not_a_run"], "neither it nor its SST-2 folder"),
    ("empty file", ["--data", "empty"], "empty/dev.tsv has no rows"),
    ("malformed row", ["--data", "malformed"], "malformed/train.tsv, line 3"),
    ("lr no number", ["--lr", "fast"], "'--lr'"),
    ("lr nan", ["--lr", "nan"], "--lr must be a number"),
    ("lr negative", ["--lr", "-1"], "--lr must be a number from 0 up"),
    ("steps negative", ["--steps", "-3"], "--steps must be at least 0, got -3"),
    ("steps no number", ["--steps", "many"], "'--steps'"),
    ("batch size", ["--batch-size", "0"], "--batch-size must be at least 1"),
    ("eps zero", ["--eps", "0"], "--eps must be a number above 0"),
    ("eps nan", ["--eps", "nan"], "--eps must be a number above 0"),
    ("eps of nothing", ["--eps", "1e-300"], "--eps must be a number above 0, from 3e-39 to 3e+38"),
    ("lr beyond binary32", ["--lr", "1e300"], "--lr must be a number from 0 up to 3e+38"),
    ("decay beyond it", ["--weight-decay", "inf"], "--weight-decay must be a number from 0 up"),
    ("steps without end", ["--steps", "9" * 30], "--steps must be at most 9223372036854775807"),
    ("seed of 65 bits", ["--seed", "9" * 20], "--seed must be at most 9223372036854775807"),
    ("queries", ["--num-queries", "0"], "--num-queries must be at least 1"),
    ("schedule", ["--schedule", "step"], "one of constant, linear, cosine"),
    ("dist", ["--dist", "cauchy"], "one of gaussian, rademacher, rank1"),
    ("scheme", ["--scheme", "adapter"], "--scheme must be one of full, lora, bitfit"),
    ("head of an encoder", ["--scheme", "head"], "this model has none"),
    ("optimizer", ["--optimizer", "lion"], "--optimizer must be one of zosgd"),
    ("objective", ["--objective", "f1"], "one of candidates, tokens, accuracy"),
    ("tokens of an encoder", ["--objective", "tokens"], "--objective tokens needs a causal LM"),
    ("examples in context of an encoder", ["--demos", "2"], "in context need a causal LM"),
    ("too many shots", ["--shots", "16"], "--shots 16 needs 32 training examples"),
    (
        "no data for the task",
        ["--task", "copa", "--data", "not_a_run"],
        "neither it nor its SuperGLUE/COPA folder",
    ),
    ("dtype", ["--dtype", "int8"], "one of float32, bfloat16, float16"),
    ("rounding", ["--rounding", "up"], "one of nearest, stochastic"),
    ("perturb", ["--perturb", "twice"], "one of on_entry, paired, in_place"),
    ("no points", ["--perturb", "paired", "--points", "1"], "--points must be a number from 2 on"),
    ("points of what", ["--points", "4"], "--points 4 needs --perturb paired"),
    ("device", ["--device", "abacus"], "--device"),
    ("backend", ["--backend", "abacus"], "abacus"),
    ("pattern matches nothing", ["--train-only", "gone"], "matches none"),
    ("pattern is broken", ["--train-only", "("], "not a regular expression"),
    ("no sentence left", ["--min-words", "50"], "no training sentence left"),
    ("word limits crossed", ["--min-words", "5", "--max-words", "2"], "is above"),
    ("best of nothing", ["--keep-best"], "--keep-best needs --eval-every"),
    ("out is not a run", ["--out", "not_a_run"], "is not a run folder"),
    ("out is not a run, forced", ["--out", "not_a_run", "--overwrite"], "is not a run folder"),
    ("out is a run", ["--out", "a_run"], "pass --overwrite"),
    ("out is a file", ["--out", "a_file"], "is a file"),
    ("json is a folder", ["--json", "data"], "is a folder"),
    ("json has no folder", ["--json", "gone/m.json"], "does not exist"),
    ("unknown option", ["--stepz", "3"], "--stepz"),
]


@pytest.mark.parametrize(("extra", "sentence"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_one_sentence_and_changes_nothing(model, place, capsys, extra, sentence):
    before = contents(place)
    good = ["--model", model, "--data", "data", "--out", "new", "--json", "old.json"]
    code = main(["finetune", *good, "--steps", "2", *extra])
    out, err = capsys.readouterr()
    assert code == 2
    assert sentence in err
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    assert contents(place) == before
    assert not (place / "new").exists()


def test_no_model_is_one_sentence(place, capsys):
    assert main(["finetune", "--steps", "2"]) == 2
    assert "--model" in capsys.readouterr().err


def test_a_process_that_is_given_rubbish_exits_2_without_a_traceback(place):
    command = [sys.executable, "-m", "zokernels.lab.cli", "finetune", "--model", "./gone"]
    done = subprocess.run(
        [*command, "--data", "data"], capture_output=True, text=True, cwd=place, env=environment()
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_json_gets_the_metrics_and_replaces_the_file(model, place):
    code = main(
        ["finetune", "--model", model, "--data", "data", "--out", "new", "--steps", "2"]
        + ["--batch-size", "4", "--json", "old.json"]
    )
    assert code == 0
    metrics = json.loads((place / "old.json").read_text())
    assert metrics == json.loads((place / "new/metrics.json").read_text())
    assert metrics["steps"] == 2


def test_without_out_the_run_gets_a_folder_of_its_own(model, place):
    assert main(["finetune", "--model", model, "--data", "data", "--steps", "1"]) == 0
    (folder,) = (place / "runs").iterdir()
    assert folder.name.startswith("sst2-")


def test_env_names_every_backend_with_a_reason(place, capsys):
    assert main(["env", "--json", "env.json"]) == 0
    found = json.loads((place / "env.json").read_text())
    assert set(found["backends"]) == set(zk.backends())
    assert all(b["reason"].strip() for b in found["backends"].values())
    out = " ".join(capsys.readouterr().out.split())
    assert all(name in out for name in found["backends"])


def test_env_has_what_a_bug_report_needs(place, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ZOKERNELS_DATA", "/home/somebody/data")
    assert main(["env", "--json", "env.json"]) == 0
    found = json.loads((place / "env.json").read_text())
    for name in ("python", "torch", "triton", "transformers", "peft"):
        assert name in found["versions"]
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["variables"]["OMP_NUM_THREADS"] == "1"
    assert "somebody" not in json.dumps(found)
    if native.why_missing() is None:
        assert found["instruction_sets"] == list(native.instruction_sets())
        assert "GCC" in found["native_built_with"] or "clang" in found["native_built_with"]
    out = capsys.readouterr().out
    for said in ("system", "instruction sets", "compiler", "memory", "gpu", "OMP_NUM_THREADS=1"):
        assert said in out


def test_env_without_a_compiler_or_a_library_says_so(place, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "./no-such-compiler")
    monkeypatch.setattr(native, "LIBRARY", place / "gone.so")
    assert main(["env", "--json", "env.json"]) == 0
    found = json.loads((place / "env.json").read_text())
    assert found["compiler"] is found["native_built_with"] is None
    assert found["instruction_sets"] == []
    assert not found["backends"]["native"]["available"]


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"zokernels {zk.__version__}\n"


def test_env_refuses_a_json_it_cannot_write(place, capsys):
    assert main(["env", "--json", "gone/env.json"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_no_word_of_the_help_is_lost():
    """rich takes what stands in brackets for a style, and shows nothing of it."""
    todo = [typer.main.get_command(app)]
    for command in todo:
        todo += getattr(command, "commands", {}).values()
        assert not [p.name for p in command.params if "[" in (getattr(p, "help", "") or "")]
    assert len(todo) > 10


@pytest.mark.parametrize("argv", [["--help"], ["finetune", "--help"], ["env", "--help"]])
def test_help_is_there(argv, capsys):
    assert main(argv) == 0
    assert "zokernels" in capsys.readouterr().out


@pytest.mark.parametrize(("after", "code"), [(0.6, 0), (0.5, 1), (0.4, 1)])
def test_a_quickstart_fails_unless_accuracy_rose(place, model, monkeypatch, after, code):
    numbers = {"dev_accuracy_before": 0.5, "dev_accuracy_after": after, "interrupted": False}
    monkeypatch.setattr(quick, "model_folder", lambda: model)
    monkeypatch.setattr(quick, "train", lambda settings, command: numbers)
    assert quick.main() == code


def test_a_quickstart_runs_twice_and_steps_can_be_set(place, model, monkeypatch, capsys):
    monkeypatch.setenv("ZOKERNELS_DATA", str(place / "data"))
    monkeypatch.setenv("STEPS", "3")
    monkeypatch.setattr(quick, "model_folder", lambda: model)
    for _ in range(2):
        assert quick.main() in (0, 1)
        metrics = json.loads((place / "runs/quickstart/metrics.json").read_text())
        assert metrics["steps"] == 3
        assert {"dev_accuracy_before", "dev_accuracy_after", "data", "seconds"} <= set(metrics)
        last = capsys.readouterr().out.strip().splitlines()[-1]
        assert last.startswith("dev accuracy ")
        assert last.endswith("runs/quickstart/report.md")


def test_a_quickstart_with_bad_steps_or_no_model_says_so(place, model, monkeypatch, capsys):
    monkeypatch.setattr(quick, "PACKAGE", "a_package_that_is_not_there")
    assert quick.main() == 2
    assert "make quickstart" in capsys.readouterr().err
    monkeypatch.setenv("STEPS", "few")
    assert quick.main() == 2
    assert "STEPS must be a whole number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("share", "threads", "taken"),
    [(0.0, 2, 2), (0.02, 2, 2), (0.5, 2, 1), (1.0, 2, 1), (0.5, 1, 1), (0.2, 8, 2)],
)
def test_the_quickstart_leaves_busy_cores_to_those_who_have_them(
    monkeypatch, share, threads, taken
):
    monkeypatch.setattr(quick.os, "cpu_count", lambda: 2)
    assert quick.threads_beside(share, threads) == taken


@pytest.mark.parametrize("chosen", [None, "OMP_NUM_THREADS", "GOMP_SPINCOUNT"])
def test_the_quickstart_says_that_it_takes_fewer_threads(monkeypatch, capsys, chosen):
    for name in quick._CHOSEN:
        monkeypatch.delenv(name, raising=False)
    if chosen:
        monkeypatch.setenv(chosen, "2")
    loads = iter([(0.0, 0.0), (0.5, 1.0)])
    monkeypatch.setattr(timing, "busy", lambda: next(loads))
    monkeypatch.setattr(quick.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(quick, "_LOOK", 0.0)
    monkeypatch.setattr(quick.torch, "get_num_threads", lambda: 2)
    taken = []
    monkeypatch.setattr(quick.torch, "set_num_threads", taken.append)
    quick.make_room()
    assert taken == ([] if chosen else [1])
    said = "Other processes have 50% of this machine's CPU time, so the quickstart takes 1 of 2"
    assert (said in " ".join(capsys.readouterr().err.split())) == (chosen is None)
