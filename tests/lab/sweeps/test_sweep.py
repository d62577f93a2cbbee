"""A grid of runs by one command: what it does, what survives, and what it refuses."""

import csv
import json
import os
import signal

import pytest
from tiny import build

from zokernels.lab.cli import main
from zokernels.lab.cli import sweep as command
from zokernels.lab.errors import InputError
from zokernels.lab.sweeps import file, plan, pool
from zokernels.lab.sweeps.folder import SweepFolder

pytestmark = pytest.mark.hf

SWEEP = """
title: Two rules
base:
  model: ${PLACE}/opt
  data: ${PLACE}
  name: tiny
  max_length: 32
  batch_size: 4
  steps: STEPS
  eval_every: 50
  eval_examples: 4
  lr: 1e-3
grid:
  optimizer: [zo-sgd, fo-adam]
seeds: [0, 1]
rules:
  - when: {optimizer: fo-adam}
    set: {lr: 2e-3}
    seeds: [3]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    build("opt", root / "opt")
    rows = [
        f"the {w} {t} \t{int(t == 'good')}\n" for w in ("film", "plot") for t in ("good", "bad")
    ]
    for split in ("train", "dev"):
        (root / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(rows) * 4)
    return root


@pytest.fixture(autouse=True)
def here(place, tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", str(place))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)


def written(text, name="grid.yaml"):
    with open(name, "w") as out:
        out.write(text)
    return name


def table(path):
    return list(csv.DictReader(path.open()))


def losses(run):
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in lines if "loss" in r]


def planned(text, out):
    path = out / written(text)
    return plan.plan(file.read(path), out / "out", path)


def test_a_sweep_is_stopped_goes_on_and_ends_in_one_table(tmp_path, monkeypatch, capsys):
    # So many steps that on a busy machine, too, the last run is still at them when it is told of.
    grid, out = written(SWEEP.replace("STEPS", "500")), tmp_path / "out"
    told, sent = command.Display.told, []

    def interrupt(self, number, run, what):
        told(self, number, run, what)
        # A second Ctrl-C would not wait for the run to save what it has.
        last = run.settings.optimizer == "zo-sgd" and run.settings.seed == 1
        if what.get("step", 0) > 1 and last and not sent:
            sent.append(1)
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(command.Display, "told", interrupt)
        # A shell's background job, as this suite may be one, ignores the signal.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        assert main(["sweep", grid, "--out", str(out), "--json", "counts.json"]) == 130
        signal.signal(signal.SIGINT, before)
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts == {"runs": 3, "finished": 2, "interrupted": 1}
    assert "interrupted" in (out / "table.md").read_text()
    (cut,) = (out / "grid").glob("zo-sgd-seed1-*")
    done = len(losses(cut))
    assert 0 < done < 500
    ends = [p for p in out.glob("grid/*/metrics.json") if p.parent != cut]
    finished = {p: p.stat().st_mtime_ns for p in ends}
    assert len(finished) == 2

    assert main(["sweep", grid, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "3 runs: 2 kept, 1 finished" in said
    assert {p: p.stat().st_mtime_ns for p in finished} == finished
    assert len(losses(cut)) == 500
    (ruled,) = (out / "grid").glob("fo-adam-seed3-*")
    assert json.loads((ruled / "config.json").read_text())["lr"] == 2e-3

    rows = table(out / "runs.csv")
    assert [(r["optimizer"], r["seed"], r["status"]) for r in rows] == [
        ("zo-sgd", "0", "finished"), ("fo-adam", "3", "finished"), ("zo-sgd", "1", "finished"),
    ]  # fmt: skip
    assert [(r["forwards"], r["backwards"]) for r in rows] == [
        ("1000", "0"), ("500", "500"), ("1000", "0"),
    ]  # fmt: skip
    first, second = table(out / "table.csv")
    after = [float(r["dev_accuracy_after"]) for r in rows[::2]]
    assert float(first["after"]) == pytest.approx(sum(after) / 2, abs=1e-5)
    assert float(first["spread"]) == pytest.approx(abs(after[0] - after[1]) / 2**0.5, abs=1e-5)
    assert (second["seeds"], second["spread"], second["note"]) == ("1", "", "one seed")
    assert "Two rules" in (out / "table.md").read_text()
    assert (out / "grid.png").read_bytes()[:4] == b"\x89PNG"


def test_a_worker_that_dies_takes_only_its_run_with_it(tmp_path):
    runs, _ = planned(SWEEP.replace("STEPS", "120"), tmp_path)
    runs[1].settings.scheme = "probe"
    runs[1].settings.optimizer = "gone"
    out, ends = tmp_path / "out", {}
    out.mkdir()

    def told(number, run, what):
        if run is runs[0] and what.get("step", 0) > 1:
            os.kill(workers._processes[number].pid, signal.SIGKILL)

    workers = pool.Pool(
        1, 1, out, told, lambda number, run, end: ends.setdefault(run.settings.out, end)
    )
    workers.do(runs)
    found = [ends[run.settings.out] for run in runs]
    assert [end.status for end in found] == ["died", "refused", "finished"]
    assert "code -9" in found[0].reason and "worker-0.log" in found[0].reason
    assert "--optimizer must be one of" in found[1].reason


def test_every_cell_comes_once_before_any_comes_twice(tmp_path):
    runs, _ = planned(SWEEP.replace("STEPS", "5"), tmp_path)
    assert [(r.settings.optimizer, r.settings.seed) for r in runs] == [
        ("zo-sgd", 0), ("fo-adam", 3), ("zo-sgd", 1),
    ]  # fmt: skip


def test_threads_are_shared(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert [pool.threads_each(n) for n in (1, 2, 3, 20)] == [8, 4, 2, 1]


def test_the_grid_of_a_preset_and_rules(tmp_path):
    text = """
base: {preset: zo-bench/sst2/opt-1.3b/lora/zo-adam, eps: 1e-2}
parts:
  lora:
    grid: {lr: published, num_queries: [1, 4]}
    rules:
      - when: {num_queries: 4, lr: [1e-4, 1e-5]}
        skip: too long
      - when: {num_queries: 4}
        set: {steps: 5000}
        seeds: [7]
"""
    runs, skipped = planned(text, tmp_path)
    cells = [(r.settings.lr, r.settings.num_queries, r.settings.steps) for r in runs]
    assert sorted(cells) == [(1e-6, 1, 20000), (1e-6, 4, 5000), (1e-5, 1, 20000), (1e-4, 1, 20000)]
    assert {(r.settings.scheme, r.settings.eps, r.settings.model) for r in runs} == {
        ("lora", 1e-2, "facebook/opt-1.3b")
    }
    assert [r.settings.seed for r in runs if r.settings.num_queries == 4] == [7]
    assert {s.reason for s in skipped} == {"too long"} and len(skipped) == 2


def test_a_later_rule_takes_in_again_what_an_earlier_one_left_out(tmp_path):
    text = """
base: {model: m}
grid: {lr: [1e-4, 1e-5, 1e-6]}
rules:
  - skip: true
  - when: {lr: 1e-5}
    skip: false
  - when: {lr: 1e-6}
    skip: too low
"""
    runs, skipped = planned(text, tmp_path)
    assert [r.settings.lr for r in runs] == [1e-5]
    assert [(s.cell["lr"], s.reason) for s in skipped] == [(1e-4, "by the file"), (1e-6, "too low")]
    for other in ("3", "", "[no]", "' '"):
        with pytest.raises(InputError, match="rules.0..skip must be true, false or a text"):
            planned(f"base: {{model: m}}\nrules:\n  - skip: {other}\n", tmp_path)


def test_sigterm_ends_a_sweep_as_ctrl_c_does(tmp_path, monkeypatch):
    grid, out, sent = written(SWEEP.replace("STEPS", "500")), tmp_path / "out", []

    def terminate(self, number, run, what):
        if what.get("step", 0) > 1 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    monkeypatch.setattr(command.Display, "told", terminate)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["sweep", grid, "--out", str(out), "--json", "counts.json"]) == 130
    assert signal.getsignal(signal.SIGTERM) == before
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts == {"runs": 3, "interrupted": 1, "not run": 2}
    (cut,) = (out / "grid").glob("zo-sgd-seed0-*")
    assert json.loads((cut / "metrics.json").read_text())["interrupted"]


def test_other_settings_are_another_run_and_the_same_are_the_same(tmp_path):
    names = [
        [r.settings.out.name for r in planned(SWEEP.replace("STEPS", steps), tmp_path)[0]]
        for steps in ("5", "5", "6")
    ]
    assert names[0] == names[1]
    assert not set(names[0]) & set(names[2])


BASE = "base: {model: m}\n"
BAD = [
    ("no YAML", "a: [", "line 1"),
    ("a list", "- 1", "the file must hold keys and values"),
    ("unknown key", "bases: {}", "there is no key bases; allowed are base, grid"),
    ("twice", "base: {model: m}\nbase: {lr: 1}", "line 2: the key base is there twice"),
    ("unknown setting", "base: {modle: m}", "base.modle: there is no such setting"),
    ("seed", "base: {seed: 3}", "base.seed: seed is the sweep's own; use seeds"),
    ("no model", "base: {lr: 1e-3}", "there is no model; set one in base"),
    ("type", BASE + "grid: {steps: [10, 2.5]}", "grid.steps[1] must be a whole number, got 2.5"),
    ("bool", "base: {model: m, template: 1}", "base.template must be true or false, got 1"),
    ("text", "base: {model: 3}", "base.model must be a text, got 3"),
    ("no list", BASE + "grid: {lr: 1e-3}", "grid.lr must be a list of values"),
    ("twice in a grid", BASE + "grid: {lr: [1e-3, 0.001]}", "grid.lr[1] is there already"),
    ("choice", BASE + "grid: {optimizer: [zo-sgd, adamw]}", "optimizer adamw: --optimizer must be"),
    ("task", "base: {model: m, task: sst3}", "no task 'sst3'"),
    ("together", "base: {model: m, optimizer: hybrid}", "needs --hybrid-split"),
    ("seeds", BASE + "seeds: [0, -1]", "seeds must be whole numbers from 0 up"),
    ("variable", "base: {model: '${NO_SUCH_PLACE}/m'}", "NO_SUCH_PLACE is not set"),
    ("preset", "base: {preset: zo-bench/sst2}", "There is no preset 'zo-bench/sst2'"),
    ("published", BASE + "grid: {lr: published}", "lr is published, but there is no preset"),
    ("rule", BASE + "rules: [{wen: {}}]", "there is no key rules[0].wen"),
    (
        "unused rule",
        BASE + "rules: [{when: {scheme: lora}, set: {lr: 1}}]",
        "rules[0] matches no cell",
    ),
    (
        "grid and rule",
        BASE + "grid: {lr: [1e-3]}\nrules: [{set: {lr: 1}}]",
        "rules[0].set.lr is a key of the grid too",
    ),
    ("part", BASE + "parts: {a: {gird: {}}}", "there is no key parts.a.gird"),
    ("package", "base: {model: 'package:no_such/x'}", "no installed package 'no_such'"),
    ("all skipped", BASE + "rules: [{skip: yes}]", "no run that is not skipped"),
]


@pytest.mark.parametrize(("text", "words"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_a_bad_file_is_one_sentence_with_its_key(tmp_path, capsys, text, words):
    assert main(["sweep", written(text), "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_sweep_is_refused(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    assert main(["sweep", written(SWEEP.replace("STEPS", "5")), "--out", "mine"]) == 2
    assert "not the folder of a sweep" in capsys.readouterr().err
    assert main(["sweep", "gone.yaml", "--out", "out"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    with SweepFolder(tmp_path / "out", ""):
        with pytest.raises(InputError, match="Another sweep is at work"):
            with SweepFolder(tmp_path / "out", ""):
                pass


def test_a_dry_run_lists_and_writes_nothing(tmp_path, capsys):
    assert main(["sweep", written(SWEEP.replace("STEPS", "5")), "--out", "out", "--dry-run"]) == 0
    assert "grid fo-adam seed 3" in capsys.readouterr().out
    assert main(["sweep", "grid.yaml", "--out", "out", "--dry-run", "--part", "gird"]) == 2
    assert "--part must be one of grid" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
