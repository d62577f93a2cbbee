"""`zokernels bench memory`: arithmetic by traced shapes, a measured step, and what doesn't fit."""

import csv
import json
import subprocess

import pytest

pytest.importorskip("transformers", reason="pip install 'zokernels[hf]'")

from zokernels.lab.benchmarks import memory, models
from zokernels.lab.benchmarks.instruments import footprint
from zokernels.lab.benchmarks.instruments.footprint import Cell
from zokernels.lab.cli import main
from zokernels.lab.errors import InputError

pytestmark = pytest.mark.hf
VOCABULARY, WIDTH, INNER, LAYERS, PLACES = 200_000, 32, 64, 3, 64


@pytest.fixture
def small(monkeypatch):
    """OPT-125M's name for a model of three layers."""
    import transformers as hf

    def config(name):
        return hf.OPTConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=INNER,
            num_hidden_layers=LAYERS, num_attention_heads=2, max_position_embeddings=PLACES,
        )  # fmt: skip

    monkeypatch.setattr(models, "config", config)
    for cached in (footprint._shape, footprint._run):
        cached.cache_clear()
    yield
    for cached in (footprint._shape, footprint._run):
        cached.cache_clear()


def of(optimizer, length=32, **extra):
    return footprint.of(Cell("opt-125m", optimizer, 2, length, **extra))


def test_weights_states_and_scratch_are_what_the_configuration_says(small):
    layer = 4 * (WIDTH * WIDTH + WIDTH) + 2 * WIDTH * INNER + INNER + WIDTH + 4 * WIDTH
    weights = VOCABULARY * WIDTH + (PLACES + 2) * WIDTH + LAYERS * layer + 2 * WIDTH
    assert of("zo-sgd").weights == 4 * weights
    assert of("zo-sgd", dtype="bfloat16").weights == 2 * weights
    assert of("zo-sgd").state == 0
    assert of("zo-sgd-mmt", dtype="bfloat16").state == 4 * weights
    assert of("zo-adam").state == 3 * 4 * weights
    assert of("fo-adam", dtype="bfloat16").state == 2 * 2 * weights
    assert of("hybrid").state == 2 * 4 * (LAYERS - LAYERS // 3) * layer
    # Every matrix of this model is small, so they are perturbed together.
    together = weights - VOCABULARY * WIDTH - (PLACES + 2) * WIDTH
    assert of("zo-sgd").scratch == 4 * (WIDTH * INNER + together)
    assert of("zo-sgd", perturb="paired").scratch == 2 * of("zo-sgd").scratch
    assert of("zo-sgd", perturb="in_place").scratch == 4 * weights
    assert of("forward-grad").scratch == 4 * VOCABULARY * WIDTH


def test_what_runs_is_added_up_by_what_is_alive(small):
    tokens, logits = 2 * 32, 2 * 32 * VOCABULARY * 4
    # A plain forward holds its logits and their log-softmax; a backward also their gradient.
    assert 2 * logits <= of("inference").run < 2.2 * logits
    gradients = of("fo-sgd").weights
    assert of("fo-sgd").run >= max(2 * logits, gradients)
    # A layer stores some 8 numbers a hidden unit and one an inner unit for its backward, and means,
    # deviations and masks.
    stored = of("fo-sgd", length=64).run - of("fo-sgd").run - 3 * logits
    formula = tokens * LAYERS * (8 * WIDTH + INNER) * 4
    assert formula < stored < 1.6 * formula
    # Logits that wait are never whole.
    assert of("zo-sgd").run < 0.6 * logits
    assert of("zo-sgd-cons").run == of("inference").run


def test_the_order_is_that_of_the_paper(small):
    total = {name: of(name).total for name in footprint.KINDS}
    assert total["zo-sgd"] < total["zo-sgd-mmt"] < total["zo-adam"]
    assert total["zo-sgd"] < total["hybrid"] < total["fo-adam"]
    assert total["zo-sgd"] < total["fo-sgd"] < total["fo-adam"]


def test_a_measured_step_is_near_its_arithmetic():
    """In a process of its own; the excess is what libraries hold for themselves."""
    row = memory.row(Cell("opt-125m", "zo-sgd", 1, 16))
    if row["source"] == memory.ARITHMETIC:
        pytest.skip("this machine has too little free memory for OPT-125M")
    assert row["source"] == memory.MEASURED
    assert 0.95 * float(row["theory_mb"]) < float(row["peak_mb"]) < 1.3 * float(row["theory_mb"])
    assert float(row["step_s"]) > 0


def test_what_does_not_fit_is_arithmetic_and_never_started(small, monkeypatch):
    monkeypatch.setattr(memory.machine, "free_memory", lambda device: 1 << 20)
    monkeypatch.setattr(memory, "run", lambda cell: pytest.fail("was started"))
    row = memory.row(Cell("opt-125m", "fo-adam", 2, 32))
    assert (row["source"], row["peak_mb"], row["step_s"]) == (memory.ARITHMETIC, "", "")


@pytest.mark.parametrize(
    ("code", "said", "source"),
    [
        (-9, "", memory.KILLED),
        (1, "x\nRuntimeError: not enough memory: you tried to allocate", memory.KILLED),
        (1, "x\nMemoryError", memory.KILLED),
        (1, "x\nValueError: no memory of such a thing", "failed: ValueError: no memory of such"),
        (3, "", "failed: it said nothing"),
    ],
)
def test_a_process_that_ends_early_says_so_in_its_row(monkeypatch, code, said, source):
    done = subprocess.CompletedProcess([], code, "", said)
    monkeypatch.setattr(memory.subprocess, "run", lambda *a, **k: done)
    found = memory.run(Cell("opt-125m", "zo-sgd", 1, 16))
    assert list(found) == ["source"]
    assert found["source"].startswith(source)


def test_a_failure_costs_no_other_row(small, tmp_path, monkeypatch, capsys):
    def run(cell):
        return {"source": "failed: why"} if cell.optimizer == "zo-sgd" else {"source": "measured"}

    monkeypatch.setattr(memory, "run", run)
    chosen = ["--optimizer", "zo-sgd", "--optimizer", "fo-sgd", "--length", "16"]
    assert main(["bench", "memory", *chosen, "--csv", str(tmp_path / "a.csv")]) == 1
    assert "fo-sgd" in (tmp_path / "a.csv").read_text()
    assert "zo-sgd, 4 × 16 failed: why" in capsys.readouterr().err


def test_the_command_writes_rows_and_a_picture(small, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    monkeypatch.setenv("COLUMNS", "120")
    found = {"zo-sgd": {"source": memory.MEASURED, "peak": 3 << 20, "seconds": 0.5}}
    monkeypatch.setattr(
        memory, "run", lambda cell: found.get(cell.optimizer, {"source": memory.KILLED})
    )
    files = {f"--{kind}": tmp_path / f"a.{end}" for kind, end in
             (("csv", "csv"), ("json", "json"), ("plot", "png"))}  # fmt: skip
    named = [str(part) for pair in files.items() for part in pair]
    options = ["--length", "16", "--length", "32", "--rows", "2"]
    chosen = ["--optimizer", "zo-sgd", "--optimizer", "fo-adam"]
    assert main(["bench", "memory", *options, *chosen, *named]) == 0
    with files["--csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == memory.COLUMNS
    assert [(r["optimizer"], r["length"], r["source"], r["peak_mb"]) for r in rows] == [
        ("zo-sgd", "16", "measured", "3"),
        ("zo-sgd", "32", "measured", "3"),
        ("fo-adam", "16", "killed for memory", ""),
        ("fo-adam", "32", "killed for memory", ""),
    ]
    assert len(json.loads(files["--json"].read_text())["memory"]) == 4
    assert files["--plot"].read_bytes().startswith(b"\x89PNG")
    assert "killed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", "gpt-5"], "--model must be one of opt-125m"),
        (["--optimizer", "lion"], "--optimizer must be one of inference, zo-sgd"),
        (["--length", "4000"], "--length is 4000, but opt-125m reads at most 2048 tokens"),
        (["--rows", "0"], "--rows must be at least 1, got 0"),
        (["--dtype", "int8"], "--dtype must be one of float32"),
        (["--device", "tpu"], "--device must be cpu, or cuda where torch sees one"),
    ],
)
def test_bad_input_is_one_sentence(capsys, options, sentence):
    assert main(["bench", "memory", *options]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="--device must be cpu, or cuda where torch sees one"):
        models.check_shape("opt-125m", 8, "cuda")
