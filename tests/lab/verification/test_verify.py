"""`zokernels verify`: it passes here, it names what is wrong, and it refuses what names nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import needs_native
from tiny import environment

import zokernels as zk
from zokernels.backends import native, reference, why_not_interpreted
from zokernels.lab import verification
from zokernels.lab.cli import main
from zokernels.lab.verification import exact, passes, training
from zokernels.lab.verification.engines import engines

ENGINES, _ = engines()
NATIVE = f"native.{native.instruction_sets()[-1]}" if native.why_missing() is None else ""
CASE = f"passes/{NATIVE}/add_noise_/bfloat16/gaussian/none/nearest/each_step"


def verify(*argv):
    return main(["verify", *argv])


@pytest.mark.parametrize(
    "only",
    [
        "noise",
        "exact/reference/*/float16/*/bits/stochastic/*",
        "exact/reference/*/bfloat16/rank1/random/nearest/*",
        "passes/*/bfloat16/gaussian/random/stochastic/*",
        "passes/*/float32/rank1/bits/nearest/*",
        "statistics/rank1",
        "statistics/rounding",
        "training/cpu/module/ZOSGD/float32",
        "training/cpu/module/textbook",
        "training/cpu/module/rank1",
        "drift/cpu/bfloat16/*/exception",
        "replay/*/ZOSGD/bfloat16/*",
    ],
)
def test_a_right_machine_passes(only, capsys):
    assert verify("--only", only) == 0
    assert " passed in " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.hf
def test_everything_passes_here(tmp_path):
    assert verify("--json", str(tmp_path / "all.json")) == 0
    found = json.loads((tmp_path / "all.json").read_text())
    assert len(found["cases"]) > 1000 and found["passed"]


def test_the_ids_are_unique_and_cover_every_value_of_every_axis():
    ids = [case.id for case in verification.plan().cases]
    assert len(set(ids)) == len(ids)
    for engine in ENGINES:
        mine = [i.split("/")[2:] for i in ids if i.startswith(f"passes/{engine.name}/")]
        axes = (passes.OPS, passes.DTYPES, passes.DISTS, passes.MASKS, passes.ROUNDINGS)
        count = 1
        for axis, values in enumerate(axes):
            assert {words[axis] for words in mine} == set(values)
            count *= len(values)
        assert len(mine) == count or engine.interpreted
    modes = {i.split("/")[-1] for i in ids if i.startswith("training/cpu/module/ZOSGD/")}
    assert modes == set(training.MODES) >= {"on_entry", "in_place"}


@needs_native
def test_a_flipped_bit_is_found_and_named(monkeypatch, tmp_path, capsys):
    # The lowest bit of element 517 of the last tensor, whatever is there.
    run = native.add_noise

    def wrong(plan):
        run(plan)
        out = plan.out[-1].view(-1)
        out.view(torch.int16)[517:518] ^= 1

    monkeypatch.setattr(native, "add_noise", wrong)
    file = tmp_path / "found.json"
    assert verify("--only", CASE, "--json", str(file)) == 1
    out = capsys.readouterr().out
    (case,) = json.loads(file.read_text())["cases"]
    difference = case["difference"]
    assert difference["index"] == 517 and difference["count"] == 1
    assert difference["tensor"] == "params[4] (1003 elements)"
    patterns = [int(difference[k].split()[0], 16) for k in ("expected", "got")]
    assert patterns[0] ^ patterns[1] == 1
    assert "differs at element 517" in out
    assert difference["expected"] in out and difference["got"] in out
    assert f"zokernels verify --only {CASE}" in out and case["command"] in out
    assert "1 of 1 cases FAILED" in out
    # The command that it prints runs this case alone, and without the fault it passes.
    monkeypatch.undo()
    assert main(case["command"].split()[1:]) == 0


@needs_native
def test_a_wrong_state_and_a_written_source_are_found(monkeypatch, capsys):
    update = native.apply_update

    def wrong(plan):
        update(plan)
        plan.states[3][1].view(-1)[7] *= -1

    monkeypatch.setattr(native, "apply_update", wrong)
    assert verify("--only", f"passes/{NATIVE}/adam/float32/gaussian/none/nearest") == 1
    assert "states[3]['v'] differs at element 7" in capsys.readouterr().out

    add = native.add_noise

    def writes_the_source(plan):
        add(plan)
        plan.params[2].view(-1)[3] = 0.5

    monkeypatch.setattr(native, "add_noise", writes_the_source)
    assert verify("--only", f"passes/{NATIVE}/add_noise/float32/gaussian/none/nearest") == 1
    assert "params[2] (9 elements) differs at element 3" in capsys.readouterr().out


def test_a_wrong_reference_is_found_by_exact_arithmetic(monkeypatch, capsys):
    # Multiply, round, add, round: what a contraction or a lack of one would change.
    monkeypatch.setattr(reference, "_fma", lambda x, c, acc: (x.float() * c + acc).to(acc.dtype))
    passes.expect.cache_clear()
    only = "exact/reference/amsgrad/float32/gaussian/none/nearest"
    try:
        assert verify("--only", only) == 1
    finally:
        passes.expect.cache_clear()
    assert "is not what exact arithmetic gives" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("only", "sentence"),
    [
        ("exact/reference/add_noise_/float32/rank1", "is not what exact arithmetic gives"),
        ("noise/reference/golden/rank1", "not the golden vector of version 1"),
    ],
)
def test_rows_that_draw_what_columns_do_are_found(only, sentence, monkeypatch, capsys):
    monkeypatch.setattr(zk.noise, "LEFT", zk.noise.RIGHT)
    passes.expect.cache_clear()
    try:
        assert verify("--only", only) == 1
    finally:
        passes.expect.cache_clear()
    assert sentence in capsys.readouterr().out


def test_forwards_along_rank1_that_are_wrong_are_found(monkeypatch, capsys):
    make = training.make

    def off(*args, **options):
        if options["perturb"] == "on_entry":
            options["eps"] = 1.001e-2
        return make(*args, **options)

    monkeypatch.setattr(training, "make", off)
    assert verify("--only", "training/cpu/module/rank1/float64") == 1
    out = capsys.readouterr().out
    assert "from that of a run in place" in out and "1 of 2 cases FAILED" in out


def test_noise_that_is_wrong_is_found(monkeypatch, capsys):
    draw = zk.noise.gaussian
    monkeypatch.setattr(zk.noise, "gaussian", lambda *a, **k: draw(*a, **k).neg())
    assert verify("--only", "noise/reference/golden/gaussian/0") == 1
    assert "not the golden vector of version 1" in capsys.readouterr().out


def test_weights_that_drift_are_found(monkeypatch, capsys):
    step = zk.ZOSGD.step

    def wrong(self, closure=None):
        loss = step(self, closure)
        with torch.no_grad():
            self.param_groups[0]["params"][2][0] += 1e-2
        return loss

    monkeypatch.setattr(zk.ZOSGD, "step", wrong)
    monkeypatch.setattr(training, "_DRIFT_STEPS", 2)
    assert verify("--only", "drift/cpu/bfloat16/in_place/steps") == 1
    assert "differs at element 0" in capsys.readouterr().out


def test_a_case_that_raises_is_a_failure_and_the_others_run(monkeypatch, capsys):
    def broken(plan):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(reference, "add_noise", broken)
    passes.expect.cache_clear()
    case = "exact/reference/add_noise_/float32/rademacher/none/nearest"
    assert verify("--only", "noise/reference/philox", "--only", case) == 1
    out = capsys.readouterr().out
    assert "RuntimeError: no such instruction" in out and "1 of 4 cases FAILED" in out


BAD = [
    (["--only", "passes/abacus"], "names no case of this machine"),
    (["--only", "nois"], "did you mean noise?"),
    (["--json", "gone/found.json"], "does not exist"),
    (["--deepest"], "--deepest"),
]


@pytest.mark.parametrize(("argv", "sentence"), BAD, ids=[" ".join(b[0]) for b in BAD])
def test_bad_input_is_one_sentence(argv, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert verify(*argv) == 2
    out, err = capsys.readouterr()
    assert sentence in err and err.count("\n") == 1 and "Traceback" not in out + err


def test_list_prints_ids_and_runs_nothing(capsys, monkeypatch):
    monkeypatch.setattr(verification.Case, "outcome", None)
    assert verify("--list", "--only", "noise/reference/philox") == 0
    assert capsys.readouterr().out.split() == [
        f"noise/reference/philox/{name}" for name in ("zeros", "ones", "pi")
    ]


def test_triton_is_verified_where_its_interpreter_is_asked_for():
    pytest.importorskip("triton", reason="needs triton: pip install triton (Linux)")
    if reason := why_not_interpreted():
        pytest.skip(reason)
    only = "passes/triton.interpreted/add_noise/*"
    done = subprocess.run(
        [sys.executable, "-m", "zokernels.lab.cli", "verify", "--list", "--only", only],
        env=environment() | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    ids = done.stdout.split()
    assert done.returncode == 0 and ids, done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "zokernels.lab.cli", "verify", "--only", ids[0]],
        env=environment() | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "triton.interpreted" in done.stdout


def test_the_instruction_set_of_the_user_comes_back():
    engine = next((e for e in ENGINES if e.isa), None)
    if engine is None:
        pytest.skip("needs the native backend: a C++ compiler when zokernels is installed")
    before = os.environ.get("ZOKERNELS_ISA")
    with engine.chosen():
        assert native.instruction_set() == engine.isa
    assert os.environ.get("ZOKERNELS_ISA") == before


def test_the_packaged_golden_vectors_are_those_of_the_tests():
    here = Path(__file__).parents[2] / "engine" / "golden" / "noise_v1.json"
    packaged = Path(zk.__file__).parent / "lab" / "data" / "noise_v1.json"
    assert here.read_bytes() == packaged.read_bytes()


@pytest.mark.parametrize("x", [2, 3, 10**9 + 7, 2**-140, 1 + 2**-20])
def test_the_exact_root_is_that_of_binary64_rounded_once(x):
    from fractions import Fraction

    number = Fraction(float(torch.tensor(float(x), dtype=torch.float32)))
    expected = torch.tensor(float(number), dtype=torch.float64).sqrt().float()
    assert float(exact.root(number)) == float(expected)
