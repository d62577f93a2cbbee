"""bench/on_gpu.sh, tried out on a CPU: every part runs, keeps rows and time, and can fail."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import varied

pytest.importorskip("triton", reason="needs triton: pip install triton (Linux)")
pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")
pytest.importorskip("xdist", reason="needs pytest-xdist: pip install '.[dev]'")

from bench.gpu import check, deadline, memory, ops, step
from bench.gpu.part import Part
from bench.report.__main__ import main as report
from zokernels.backends import why_not_interpreted
from zokernels.lab.benchmarks import memory as memories
from zokernels.lab.benchmarks import ops as passes
from zokernels.lab.benchmarks import results
from zokernels.lab.benchmarks import step as steps

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "on_gpu.sh"
PARTS = {"check": check, "ops": ops, "step": step, "memory": memory}
pytestmark = [
    pytest.mark.hf,
    pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash"),
]


def run(*arguments, script=SCRIPT, python=sys.executable, **environment):
    # As from a shell: what this process has chosen for itself is not handed on.
    own = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_", "OUT"))}
    return subprocess.run(
        ["bash", str(script), *map(str, arguments)],
        env=own | {"PYTHON": python, "COMMIT": "abc1234"} | environment,
        capture_output=True,
        text=True,
    )


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """All parts, tried out once for all tests."""
    if reason := why_not_interpreted():
        pytest.skip(reason)
    out = tmp_path_factory.mktemp("gpu")
    done = run("all", "--dry", "--out", out)
    assert done.returncode == 0, done.stdout[-6000:] + (out / "errors.log").read_text()[-3000:]
    return out


def test_every_file_of_checks_is_run():
    assert sorted(check.FILES) == sorted(p.name for p in (ROOT / "tests/gpu").glob("test_*.py"))


def test_every_kind_of_check_passes(dry):
    found = {row["kind"]: row for row in rows_of(dry / "check.csv")}
    assert tuple(next(iter(found.values()))) == deadline.COLUMNS
    assert {
        "a training pass", "a training update", "a hundred million weights",
        "a tensor of more than two to the 31 elements", "a step has the cpus losses",
        "every mode has the same slope", "two hundred steps at rate 0 change no bit",
        "a run on the device is replayed by a cpu", "a graph replays the step",
        "a graph is the optimizers step where the losses are",
        "a trajectory of replays is replayed here and on a cpu", "add noise", "apply update",
        "a run is replayed by a cpu and evaluated to its number", "raw noise",
        "steps have the cpus bits and its log",
    } <= {kind for kind, row in found.items() if int(row["passed"])}  # fmt: skip
    assert all((row["failed"], row["left"]) == ("0", "0") for row in found.values())


def test_every_pass_has_a_row_beside_a_copy_and_mezos_expressions(dry):
    found = rows_of(dry / "ops.csv")
    assert tuple(found[0]) == passes.COLUMNS
    ours = {(r["op"], r["dist"], r["variant"]) for r in found if r["case"] == "triton"}
    adds = {(op, dist, variant) for op in ("add_noise_", "add_noise")
            for dist in ("gaussian", "rademacher") for variant in ("", "8 seeds")}  # fmt: skip
    rules = {(rule, "gaussian", "") for rule in ("sign", "momentum", "adam", "amsgrad")}
    assert adds | rules | {("adam", "gaussian", "bfloat16 states")} <= ours
    assert {"floor", "mezo", "mezo-inplace", "mezo-compiled"} <= {row["case"] for row in found}
    assert len({row["shape"] for row in found if row["shape"]}) >= 4
    assert all(float(row["gb_per_s"]) >= 0 and row["triton"] for row in found)


def test_every_mode_has_a_row_and_one_has_the_peers_beside_it(dry):
    found = rows_of(dry / "step.csv")
    assert tuple(found[0]) == steps.COLUMNS
    assert {row["perturb"] for row in found} == {*steps.MODES, *steps.GRAPHED}
    (beside,) = (row for row in found if row["mezo"])
    assert float(beside["fo-sgd"]) > 0 and not beside["perturb"].startswith("graphed")


def test_every_optimizers_peak_stands_beside_its_arithmetic(dry):
    found = rows_of(dry / "memory.csv")
    assert tuple(found[0]) == memories.COLUMNS
    assert {row["optimizer"] for row in found} == {"zo-sgd", "fo-sgd", "fo-adam"}
    assert all(row["source"] == "measured" and row["theory_mb"] for row in found)


def test_rows_say_what_the_checks_found_and_of_which_commit(dry):
    for name in ("ops", "step", "memory"):
        for row in rows_of(dry / f"{name}.csv"):
            assert re.fullmatch(r"gpu checks: \d+ passed, 0 failed", row["tests"])
            assert row["commit"] != "unknown" and row["machine"]


def test_the_summary_tells_of_every_part_in_turn_and_that_none_outran_its_time(dry):
    lines = (dry / "summary.txt").read_text(encoding="utf-8").splitlines()
    names = list(dict.fromkeys(line.split()[0] for line in lines))
    assert names == list(PARTS)
    ends = [re.search(r"(\d+) of (\d+) done, 0 failed, 0 left .*; (\d+) of (\d+) s", line)
            for line in lines]  # fmt: skip
    ends = [end for end in ends if end]
    assert len(ends) == len(PARTS)
    for end in ends:
        done, planned, taken, most = map(int, end.groups())
        assert done == planned and taken <= most


def head():
    """The seconds that the script's head tells of, and what its commands may take."""
    text = SCRIPT.read_text(encoding="utf-8")
    told = {name: int(n) for name, n in re.findall(r"^#   (\w+) +(\d+)  ", text, re.MULTILINE)}
    held = {name: int(n) for name, n in re.findall(r"\[(\w+)\]=(\d+)", text)}
    return told, held


def test_the_arithmetic_of_its_head_adds_up_to_eight_minutes():
    told, held = head()
    assert held == {name: told[name] for name in PARTS}
    assert told["all"] == sum(held.values()) + told["build"] <= 480


@pytest.mark.parametrize("name", ["step", "memory"])
def test_what_a_part_is_to_do_fits_in_its_time(name, tmp_path):
    """With 15 s to import torch and transformers, and 5 s before it would be stopped."""
    _, held = head()
    jobs = PARTS[name].jobs(Part(name, held[name], tmp_path, dry=False))
    assert sum(job.seconds for job in jobs) <= held[name] - 20
    # Half of it at least: else there is room for more.
    assert sum(job.seconds for job in jobs) >= held[name] / 2


def test_the_passes_fit_in_their_time():
    _, held = head()
    assert ops.COMPILE_SECONDS + sum(seconds for _, seconds, _ in ops.JOBS) <= held["ops"] - 15
    cases = passes.cases(ops.plan(Part("ops", 100, Path(), dry=True))) if interpreted() else []
    for case in (c for c in cases if c.name == "triton"):
        assert sum(chosen(case) for _, _, chosen in ops.JOBS[:2] + ops.JOBS[3:]) == 1


def interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"


JOBS = """
from bench.gpu.part import Job, Part

part = Part.of_arguments("ops")

def breaks():
    part.broken = True  # as a context on a device would be
    raise ValueError("it is broken\\nand more")

def keeps():
    assert not hasattr(part, "broken")
    part.keep(("x", "tests"), [{"x": 1}])
    return ["a line"]

jobs = [Job("first", 1, breaks), Job("long", 1000, keeps), Job("second", 1, keeps),
        Job("bad", 1, breaks), Job("last", 1, keeps)]
raise SystemExit(part.run(jobs))
"""


def test_a_job_that_fails_or_does_not_fit_costs_no_other(tmp_path):
    script = tmp_path / "jobs.py"
    script.write_text(JOBS)
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(script), "--seconds", "100", "--out", str(out), "--dry"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert rows_of(out / "ops.csv") == [{"x": "1", "tests": "gpu checks not run"}] * 2
    summary = (out / "summary.txt").read_text()
    assert "FAILED first: ValueError: it is broken\n" in summary
    assert "FAILED bad: ValueError" in summary and summary.count("a line") == 2
    assert "2 of 5 done, 2 failed, 1 left for time" in summary and "left: long" in summary
    assert done.stderr.count("Traceback") == 2


@pytest.fixture
def copied(tmp_path):
    """The script apart from the project, with a Python that only notes what it is asked."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "zokernels" / "backends").mkdir(parents=True)
    (tmp_path / "zokernels" / "backends" / "_native.so").touch()
    script = tmp_path / "bench" / "on_gpu.sh"
    text = SCRIPT.read_text(encoding="utf-8")
    script.write_text(text.replace("[ops]=100", "[ops]=1"), encoding="utf-8")
    python = tmp_path / "python"
    python.write_text(
        '#!/usr/bin/env bash\necho "$2 $COMMIT" >> "$(dirname "$0")/asked"\n'
        '[ "$2" = "$HANGS" ] && sleep 30\n[ "$2" != "$BREAKS" ]\n'
    )
    python.chmod(0o755)

    def start(*arguments, **environment):
        done = run(*arguments, script=script, python=str(python), **environment)
        asked = tmp_path / "asked"
        return done, asked.read_text().splitlines() if asked.exists() else []

    return start


def test_a_part_that_breaks_or_hangs_is_told_of_and_the_others_run(copied, tmp_path):
    done, asked = copied("--out", tmp_path / "out", BREAKS="bench.gpu.check", HANGS="bench.gpu.ops")
    assert asked == [f"bench.gpu.{name} abc1234" for name in PARTS]
    assert done.returncode == 1
    assert "check: exit code 1" in done.stdout
    # 124: stopped for time.
    assert "ops: exit code 124" in done.stdout and "step: exit" not in done.stdout


def test_a_part_can_be_named(copied, tmp_path):
    done, asked = copied("memory", "ops", "--out", tmp_path / "out")
    assert asked == ["bench.gpu.memory abc1234", "bench.gpu.ops abc1234"]
    assert done.returncode == 0


def test_help_is_for_a_stranger_and_bad_input_a_sentence(copied):
    done, asked = copied("--help")
    assert done.returncode == 0 and not asked
    for word in (*PARTS, "--dry", "--out", "480", "pytest-xdist", "COMMIT", "bench/results/gpu"):
        assert word in done.stdout
    assert "set -uo" not in done.stdout
    done, asked = copied("opps")
    assert done.returncode == 2 and not asked
    assert done.stderr == "'opps' is no part; the parts are check ops step memory and all.\n"
    done, _ = copied("--out")
    assert done.returncode == 2 and done.stderr == "--out needs a folder.\n"


def test_without_a_gpu_a_part_says_so():
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.memory", "--seconds", "9", "--out", "unused"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and not (ROOT / "unused").exists()
    assert done.stderr == "torch sees no CUDA device here; --dry runs the same code on the CPU.\n"


def test_tests_after_the_deadline_are_left_and_all_outcomes_counted(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import os, time, pytest\n"
        "@pytest.mark.parametrize('n', range(3))\n"
        "def test_right(n): pass\n"
        "def test_wrong(): assert 0\n"
        "def test_no_case(): pytest.skip('why')\n"
        f"def test_last(): os.environ['{deadline.DEADLINE}'] = str(time.time() - 1)\n"
        "def test_too_late(): assert 0\n"
    )
    counts = tmp_path / "counts.csv"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu.deadline", "-p", "no:cacheprovider",
         "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), deadline.COUNTS: str(counts)},
    )  # fmt: skip
    assert "5 cases ran, 1 of them failed; 1 were left for time" in done.stdout, done.stdout
    found = {r["kind"]: tuple(r[c] for c in deadline.COLUMNS[-4:]) for r in rows_of(counts)}
    assert found == {
        "right": ("3", "0", "0", "0"), "wrong": ("0", "1", "0", "0"),
        "no case": ("0", "0", "0", "1"), "last": ("1", "0", "0", "0"),
        "too late": ("0", "0", "1", "0"),
    }  # fmt: skip


def test_a_bit_that_differs_is_told_with_its_place(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "gpu"))
    from device import assert_same

    right = varied(100, torch.bfloat16)
    wrong = right.clone()
    wrong.view(torch.int16)[37] ^= 1
    assert_same([right, right], [right, right.clone()])
    with pytest.raises(pytest.fail.Exception, match=r"tensor 1, 100 elements of .*: 1 differ.*37"):
        assert_same([right, right], [right, wrong])


# What such a machine has not, of all that this project can use.
ABSENT = ("datasets", "sybil", "mkdocs", "torchzero", "trl", "mypy", "ruff", "pyinstrument")


def test_it_imports_only_what_its_head_names(tmp_path):
    text = run("--help").stdout
    needed = text[text.index("It needs") :]
    assert not [name for name in ABSENT if name in needed]
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {ABSENT!r}:\n"
        "            raise ModuleNotFoundError(f'{name} is not there', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    own = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "ZOKERNELS_GPU_DRY": "1"}
    modules = ", ".join(f"bench.gpu.{name}" for name in PARTS)
    code = f"import {modules}, pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "-q", "--collect-only", "-m", "gpu", "-p", "no:cacheprovider",
         "-p", "bench.gpu.deadline", str(ROOT / "tests" / "gpu")],
        cwd=ROOT, env=os.environ | own, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ tests collected", done.stdout)


def test_a_graph_is_not_timed_beside_what_moves_its_weights():
    case = steps.Case("opt-tiny", perturb="graphed_paired", peers=("mezo",))
    with pytest.raises(ValueError, match="can't be timed beside peers"):
        steps.measure(case, 1)


def of_a_gpu(found, machine="NVIDIA H200", **changed):
    return [{**row, "machine": machine, **changed} for row in found]


def test_the_documents_show_the_rows_of_a_gpu_and_without_any_what_they_say_now(
    dry, tmp_path, capsys
):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install '.[bench]'")
    root = tmp_path / "checkout"
    for folder in ("docs", "bench/results"):
        shutil.copytree(ROOT / folder, root / folder)
    shutil.copy(ROOT / "README.md", root)
    places = {name: root / name for name in ("README.md", "docs/performance.md", "docs/memory.md")}
    assert report(["--root", str(root), "--check"]) == 0

    made = {name: rows_of(dry / f"{name}.csv") for name in PARTS}
    size = dict(model="opt-1.3b", rows="16", dist="gaussian", ratio="1.07", low="1.06", high="1.08")
    made["step"] = [
        row for length in ("64", "512") for row in of_a_gpu(made["step"], length=length, **size)
    ]
    for name, found in made.items():
        path = root / "bench" / "results" / "gpu" / f"{name}.csv"
        results.replace(path, list(found[0]), of_a_gpu(found))
    capsys.readouterr()
    assert report(["--root", str(root)]) == 0, capsys.readouterr().err
    assert report(["--root", str(root), "--check"]) == 0
    readme, performance, peaks = (p.read_text(encoding="utf-8") for p in places.values())
    assert "not timed on a GPU" not in readme
    assert re.search(
        r"Alpha. On NVIDIA H200: \d+ of \d+ cases gave the CPU's bits.*opt-1.3b, 16 × 512, "
        r"as a CUDA graph takes 1.07 \(gaussian\) times", readme
    )  # fmt: skip
    assert "| opt-1.3b, 16 × 512, graphed paired, gaussian | ≤ 1.10 | 1.07 | yes |" in performance
    assert "| `add_noise_` gaussian bfloat16, of a copy | ≥ 85 % | 0 % | no |" in performance
    assert "figures/gpu-step.png" in performance
    assert (root / "docs/figures/gpu-step.png").read_bytes().startswith(b"\x89PNG")
    assert "**opt-tiny, bfloat16**; NVIDIA H200; " in peaks
