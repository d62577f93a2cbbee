"""`zokernels bench ops` and what all of bench shares: rows, files, and refusals."""

import csv
import json
import random

import pytest
from conftest import needs_native

from zokernels.lab.benchmarks import machine, ops, passes, results, timing
from zokernels.lab.cli import inputs, main
from zokernels.lab.cli.bench import output
from zokernels.lab.errors import InputError

TINY = ["bench", "ops", "--device", "cpu", "--numel", "3001", "--repeats", "2"]


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@needs_native
def test_bench_ops_writes_every_pass_beside_its_floor_and_peers(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    files = {
        "--csv": tmp_path / "a.csv",
        "--json": tmp_path / "a.json",
        "--plot": tmp_path / "a.png",
    }
    named = [str(part) for pair in files.items() for part in pair]
    for dtype in ("bfloat16", "float32"):
        assert main([*TINY, "--dtype", dtype, *named]) == 0
    found = table(files["--csv"])
    assert tuple(found[0]) == ops.COLUMNS
    # Appended, where the JSON was replaced.
    assert list(dict.fromkeys(row["dtype"] for row in found)) == ["bfloat16", "float32"]
    last = json.loads(files["--json"].read_text())["ops"]
    assert {row["dtype"] for row in last} == {"float32"}
    assert files["--plot"].read_bytes().startswith(b"\x89PNG")
    assert "add_noise_, 8 steps" in capsys.readouterr().out
    shown = {(row["op"], row["variant"], row["case"].split("-")[0]) for row in found}
    for op in ("add_noise_", "momentum", "adam"):
        assert (op, "", "floor") in shown
    for variant in ("", "random mask", "stochastic", "8 seeds", "8 steps"):
        assert ("add_noise_", variant, "native") in shown
    assert {("sign", "", "native"), ("adam", "", "torch"), ("add_noise_", "", "mezo")} <= shown
    for row in found:
        assert row["tests"] in ("passed", "failed", "not run")
        assert row["fastest_peer"] in ("mezo", "mezo-inplace", "torch-optim", "expression", "")
        assert float(row["low"]) <= float(row["ratio_to_floor_median"]) <= float(row["high"])
        assert row["ratio_to_floor_median"] == "1.000" or row["case"] != "floor"
        assert (row["speedup_over_mezo"] != "") == (row["op"] == "add_noise_")


@needs_native
def test_the_full_set_has_every_instruction_set_mask_and_state():
    native = ops.cases(ops.Plan(full=True))
    names = {c.name for c in native}
    assert names >= {"native-portable", "mezo-compiled", "mezo-inplace-compiled"}
    assert {c.dtype for c in ops.cases(ops.Plan(full=True, dtypes=tuple(passes.DTYPES)))} == {
        "float32", "bfloat16", "float16",
    }  # fmt: skip
    assert {c.variant for c in native} >= {"bit mask", "magnitude mask", "bfloat16 states"}
    floors = {c.floor for c in native if c.name == "floor"}
    assert {c.floor for c in native} == floors
    assert len({str(c) for c in native}) == len(native)


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_ratio_is_of_one_repetition_and_counts_directions(rounds):
    def case(name, seeds=1, peer=False):
        dist = "" if name == "floor" else "gaussian"
        return passes.Case("float32", "add_noise_", dist, "", name, print, seeds, peer)

    floor, eight, mezo = case("floor"), case("native-avx2", 8), case("mezo", peer=True)
    # The machine halves its speed after the first repetition; mezo runs in every second.
    times = {floor: [1e-3, 2e-3, 2e-3], eight: [3e-3, 6e-3, 6e-3], mezo: [9e-3, 18e-3]}
    every = {floor: 1, eight: 1, mezo: 2}
    found = {row["case"]: row for row in ops.summarize([times] * rounds, every, 1_000_000)}
    ours = found["native-avx2"]
    assert (ours["ratio_to_floor_median"], ours["low"], ours["high"]) == ("3.000",) * 3
    assert found["mezo"]["ratio_to_floor"] == "9.000"
    assert ours["ns_per_weight"] == "6.0000" and ours["gb_per_s"] == "1.3"
    # Eight of MeZO's passes, of 13.5 ms, against 6 ms.
    assert ours["speedup_over_mezo"] == "18.00" and ours["fastest_peer"] == "mezo"
    assert ours["repeats"] == 3 * rounds and found["mezo"]["repeats"] == 2 * rounds


def test_a_turn_has_every_case_once_and_the_types_in_turn():
    groups = [["a1", "a2", "a3"], ["b1", "b2", "b3"]]
    orders = {tuple(timing.turn(groups, random.Random(n))) for n in range(20)}
    for order in orders:
        assert sorted(order) == sorted(groups[0] + groups[1])
        assert [name[0] for name in order] == ["a", "b"] * 3
    assert len(orders) > 5


def test_the_spread_is_the_quartiles():
    assert timing.spread([4.0]) == timing.Spread(4, 4, 4)
    assert timing.spread([5, 1, 2, 3, 4]) == timing.Spread(3, 2, 4)


def test_other_processes_are_told_of():
    assert timing.others((0, 100), (1, 200)) is None
    assert "20% of its CPU time" in timing.others((0, 100), (20, 200))
    assert timing.others(None, None) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int8"], "--dtype must be one of float32"),
        (["--device", "tpu"], "--device must be cpu or cuda"),
        (["--numel", "0"], "'--numel'"),
        (["--numel", "10000000000000"], "GiB are free"),
        (["--repeats", "0"], "'--repeats'"),
        (["--csv", "none/rows.csv"], "its folder does not exist"),
        (["--csv", "."], "no ordinary file"),
        (["--csv", "others.csv"], "other columns"),
        (["--csv", "picture.png"], "cannot be read"),
        (["--json", "none/out.json"], "does not exist"),
        (["--plot", "none/a.png"], "its folder does not exist"),
        (["--plot", "a.txt"], "must end in .png, .svg or .pdf"),
    ],
)
def test_bench_ops_refuses_before_it_measures(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "others.csv").write_text("date,commit\n1,2\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe\x00")
    monkeypatch.setattr(ops, "measure", lambda *_: pytest.fail("It measured."))
    assert main(["bench", "ops", "--device", "cpu", *options]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert (tmp_path / "others.csv").read_text() == "date,commit\n1,2\n"


def test_a_gpu_that_is_not_there_is_refused(capsys):
    assert main(["bench", "ops", "--device", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_without_kernels_there_is_nothing_to_measure(monkeypatch, capsys):
    def missing(plan):
        raise passes.Unavailable("Nothing to measure: it was not built.")

    monkeypatch.setattr(ops, "cases", missing)
    assert main(TINY) == 2
    assert "Nothing to measure: it was not built." in capsys.readouterr().err


def test_without_matplotlib_a_plot_is_refused_by_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inputs.importlib.util, "find_spec", lambda name: None)
    assert main([*TINY, "--plot", str(tmp_path / "a.png")]) == 2
    assert "--plot needs matplotlib: pip install" in capsys.readouterr().err


def test_rows_are_appended_to_a_file_from_before_a_column(tmp_path):
    path, columns = tmp_path / "old.csv", ("date", "tests", "case")
    path.write_text("date,case\n2026-11-24,floor\n")
    with pytest.raises(InputError, match="other columns"):
        results.check(path, columns)
    results.check(path, columns, machine.LATER)
    results.append(path, columns, [{"date": "2026-11-25", "tests": "passed", "case": "mezo"}])
    assert path.read_text() == "date,tests,case\n2026-11-24,,floor\n2026-11-25,passed,mezo\n"
    results.check(path, columns)
    # An editor may have taken the last line's end.
    path.write_text(path.read_text().rstrip("\n"))
    results.append(path, columns, [{"date": "2026-11-26", "tests": "", "case": "floor"}])
    assert path.read_text().endswith("\n2026-11-25,passed,mezo\n2026-11-26,,floor\n")


@pytest.mark.parametrize("name", ["ops", "step", "codegen"])
def test_the_committed_rows_can_be_appended_to(name):
    from zokernels.lab.benchmarks import step
    from zokernels.lab.cli.bench import codegen

    columns, later = {
        "ops": (ops.COLUMNS, ops.LATER),
        "step": (step.COLUMNS, step.LATER),
        "codegen": (codegen.COLUMNS, codegen._ABOUT),
    }[name]
    results.check(machine.ROOT / "bench" / "results" / f"{name}.csv", columns, later)


def test_a_file_that_cannot_be_written_does_not_keep_the_others_from_it(tmp_path, monkeypatch):
    out = output.Output(tmp_path / "a.csv", tmp_path / "a.json", None, ("x",))
    kept = output.Rows(out, "it")
    monkeypatch.setattr(
        results, "append", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full"))
    )
    kept.add({"x": 1})
    with pytest.raises(Exception, match="--csv .* could not be written: disk full"):
        kept.finish(lambda: None)
    assert json.loads((tmp_path / "a.json").read_text()) == {"it": [{"x": 1}]}


@needs_native
def test_a_peer_that_fails_is_left_out_and_a_pass_of_ours_is_not(monkeypatch):
    def failing(peer):
        def run():
            raise RuntimeError("no kernel\nand a trace")

        case = passes.Case("float32", "sign", "gaussian", "", "broken", lambda t: run, peer=peer)
        monkeypatch.setattr(
            ops, "cases", lambda plan: [*passes.floors("float32", "cpu", False), case]
        )
        return ops.measure(ops.Plan(numel=1000, dtypes=("float32",), repeats=1))

    found = failing(peer=True)
    assert {row["case"] for row in found.rows} == {"floor"}
    assert "float32-sign-gaussian-broken left out: no kernel" in found.notes
    with pytest.raises(RuntimeError, match="no kernel"):
        failing(peer=False)
