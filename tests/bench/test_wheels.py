"""A wheel's row: of this checkout's wheel, of its own kernels, with no compiler near."""

import copy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import needs_native
from tiny import environment

from bench import wheels
from bench.report.tables import wheels as table
from zokernels.lab.benchmarks import machine, results

FOUND = {
    "environment": {
        "versions": {"python": "3.12.1", "torch": "2.10.0+cpu"},
        "system": "Linux-6.1-x86_64-with-glibc2.36",
        "threads": 2,
        "compiler": None,
        "native_built_with": "GCC: (somewhere) 14.2.1",
        "instruction_sets": ["portable", "avx2"],
        "backends": {"native": {"available": True, "reason": "C++ for CPU tensors."}},
    },
    "cases": [{"passed": True}] * 6 + [{"passed": False}],
    "seconds": 61.7,
    "openmp": "torch/lib/libgomp.so.1",
}


def wheel_of_the_checkout(place, **changed):
    """A wheel of the package's files, as far as they are compared; None leaves one out."""
    path = place / "zokernels-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted((machine.ROOT / "zokernels").rglob("*.py")):
            name = file.relative_to(machine.ROOT).as_posix()
            text = changed.get(file.stem, file.read_text(encoding="utf-8"))
            if text is not None:
                archive.writestr(name, text)
        archive.writestr("zokernels/backends/_native.so", "of some compiler")
    return path


@pytest.mark.parametrize("changed", [{}, {"masks": "other"}, {"masks": None}])
def test_a_wheel_of_another_commit_is_told_from_the_checkouts(tmp_path, changed):
    found = wheels.differences(wheel_of_the_checkout(tmp_path, **changed))
    assert found == (["zokernels/masks.py"] if changed else [])


def test_another_commits_wheel_is_refused_before_anything_is_installed(tmp_path, capsys):
    wheel = wheel_of_the_checkout(tmp_path, masks="other")
    given = [str(wheel), "--python", "no-python", "--torch", "2.10.0"]
    assert wheels.main([*given, "--out", str(tmp_path / "rows.csv")]) == 1
    assert "zokernels/masks.py" in capsys.readouterr().err
    assert not (tmp_path / "rows.csv").exists()


def test_a_compiler_or_missing_kernels_are_no_row():
    assert wheels.refusal(FOUND) is None
    compiled = copy.deepcopy(FOUND)
    compiled["environment"]["compiler"] = "g++ 12"
    assert "g++ 12" in wheels.refusal(compiled)
    missing = copy.deepcopy(FOUND)
    missing["environment"]["backends"]["native"] = {"available": False, "reason": "not built."}
    assert "not built." in wheels.refusal(missing)


def test_rows_become_a_line_an_environment_in_the_order_of_versions(tmp_path):
    path = tmp_path / "rows.csv"
    for python, torch, failed in (
        ("3.12.1", "2.10.0+cpu", 1), ("3.9.2", "2.9.0", 0), ("3.12.1", "2.10.0+cpu", 0),
    ):  # fmt: skip
        found = copy.deepcopy(FOUND)
        found["environment"]["versions"] = {"python": python, "torch": torch}
        found["cases"] = [{"passed": n >= failed} for n in range(2244)]
        results.append(path, wheels.COLUMNS, [wheels.row(found, "a-py3-none-b.whl")])
    rows = results.read(path)
    assert [r["failed"] for r in rows] == ["1", "0", "0"] and rows[0]["libc"] == "glibc 2.36"
    _, _, lines = table.table(rows).partition("\n\n")
    first, second = lines.splitlines()[2:]
    assert first.startswith("| 3.9.2 | 2.9.0 |") and second.startswith("| 3.12.1 | 2.10.0+cpu |")
    assert second.endswith("| 2,244 passed |")
    assert "**1 of 2,244 FAILED**" in table.table(rows[:1])


@needs_native
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_torch_and_a_pass_run_on_one_openmp_library_and_a_forked_child_ends():
    command = [sys.executable, "-c", wheels.OPENMP]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=True, timeout=120
    )
    assert len(done.stdout.split()) == 1, done.stdout
