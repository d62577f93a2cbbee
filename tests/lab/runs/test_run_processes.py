"""``torchrun -m zokernels finetune``: one run in several processes, and what survives of it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny import environment

from zokernels.lab.errors import InputError
from zokernels.lab.models import loading
from zokernels.lab.runs.history import Mean
from zokernels.lab.runs.run import Finetune
from zokernels.lab.runs.settings import Settings

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]
GIVEN = dict(steps=6, batch_size=8, lr=1e-2, eps=1e-2, max_length=32, num_queries=4, eval_every=3)


def options(places, out, **extra):
    given = {**GIVEN, "model": places / "opt", "data": places, "out": out, **extra}
    return [w for k, v in given.items() for w in (f"--{k.replace('_', '-')}", str(v))]


def torchrun(words, ranks=2, wait=True):
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        + [f"--nproc-per-node={ranks}", "-m", "zokernels", "finetune", *words],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if not wait:
        return process
    said, errors = process.communicate(timeout=150)
    return process.returncode, said, errors


def alone(places, out, **extra):
    given = {**GIVEN, "model": str(places / "opt"), "data": str(places), "out": out, **extra}
    return Finetune(Settings(**given)).run()


def weights(folder):
    return {n: p.detach() for n, p in loading.load(str(folder)).model.named_parameters()}


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(a, b):
    first, second = weights(a / "final"), weights(b / "final")
    return all(torch.equal(first[n], second[n]) for n in first)


def test_directions_divided_over_processes_are_one_run_to_the_bit(places, tmp_path):
    out = tmp_path / "two"
    code, said, errors = torchrun(options(places, out, parallel="query"))
    assert code == 0, errors
    whole = alone(places, tmp_path / "one")
    assert same(tmp_path / "one", out)
    found = json.loads((out / "metrics.json").read_text())
    assert found["processes"] == 2
    for name in ("dev_accuracy_before", "dev_accuracy_after", "dev_examples"):
        assert found[name] == pytest.approx(whole[name])
    pairs = list(zip(lines(tmp_path / "one"), lines(out), strict=True))
    assert all(
        a.get("projected_gradients") == b.get("projected_gradients")
        and a.get("examples") == b.get("examples")
        for a, b in pairs
    )
    # One speaks.
    assert said.count("Data: SST-2 from") == 1 and said.count("-> ") == 1
    assert "2 processes of" in (out / "report.md").read_text()


ENDING = """
import atexit, os
from zokernels.lab.cli import end

class Thread:
    # As a group's thread may do that is there as the interpreter ends.
    def __del__(self, abort=os.abort):
        abort()

held = Thread()
atexit.register(print, "said at the exit")
end()
"""


def test_a_thread_of_a_group_does_not_abort_the_end_of_a_process():
    launched = {**environment(), "RANK": "1", "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", ENDING, "--version"], env=launched, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("zokernels ") and done.stdout.endswith("said at the exit\n")


@pytest.mark.parametrize("extra", [dict(), dict(keep_best="", patience=1)], ids=["plain", "best"])
def test_a_shared_batch_is_the_same_run_up_to_the_mean(places, tmp_path, extra):
    out = tmp_path / "two"
    words = [w for w in options(places, out, **extra) if w]
    code, _, errors = torchrun(words)
    assert code == 0, errors
    alone(places, tmp_path / "one", **{k: v or True for k, v in extra.items()})
    one, two = ([r["loss"] for r in lines(p) if "loss" in r] for p in (tmp_path / "one", out))
    assert two == pytest.approx(one, rel=1e-4)
    assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}


@pytest.mark.parametrize("scheme", ["full", "lora"])
def test_weights_cut_over_processes_are_trained_and_saved_whole(places, tmp_path, scheme):
    out = tmp_path / "two"
    more = dict(scheme=scheme, num_queries=2)
    code, said, errors = torchrun([*options(places, out, **more), "--shard"])
    assert code == 0, errors
    whole = alone(places, tmp_path / "one", **more)
    one, two = ([r["loss"] for r in lines(p) if "loss" in r] for p in (tmp_path / "one", out))
    assert two == pytest.approx(one, rel=1e-4)
    found = json.loads((out / "metrics.json").read_text())
    assert found["dev_accuracy_after"] == pytest.approx(whole["dev_accuracy_after"], abs=0.02)
    assert found["all_weights"] == whole["all_weights"]
    # The log is that of the whole weights: one process makes what two have saved.
    from zokernels.lab.cli import main

    assert main(["replay", str(places / "opt"), str(out), "--verify"]) == 0


def test_a_killed_process_ends_the_run_which_then_goes_on_in_one(places, tmp_path):
    out = tmp_path / "two"
    more = dict(parallel="query", steps=400, eval_every=0, eval_examples=8)
    process = torchrun(options(places, out, **more), wait=False)
    deadline = time.monotonic() + 100
    log = out / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and log.read_text().count('"loss"') >= 5:
            break
        time.sleep(0.05)
    found = subprocess.run(
        ["pgrep", "-f", f"zokernels finetune.*{out}"], capture_output=True, text=True
    ).stdout.split()
    ranks = sorted({int(p) for p in found} - {process.pid, os.getpid()})
    os.kill(ranks[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "zokernels/lab" not in errors.split("torch.distributed.elastic")[0]
    done = sum("loss" in r for r in lines(out))
    assert 5 <= done < 400
    resumed = Finetune(_resumed(out, 40 if done < 40 else done + 5), resume=True)
    assert resumed.run()["steps"] == resumed.settings.steps
    alone(places, tmp_path / "one", **{**more, "parallel": None, "steps": resumed.settings.steps})
    assert same(tmp_path / "one", out)


def _resumed(out, steps):
    """The run's settings, of fewer steps, so that the test ends."""
    from zokernels.lab.runs.resume import settings_of

    found = settings_of(out)
    found.steps, found.parallel = steps, None
    return found


BAD = [
    (dict(parallel="both"), "--parallel must be data, query, or two numbers D,Q"),
    (dict(parallel="2,2"), "--parallel 2,2 makes 4 processes, and 2 were started"),
    (dict(batch_size=7), "--batch-size 7 is no multiple of the 2 shares"),
    (dict(parallel="query", num_queries=3), "--num-queries 3 is no multiple of the 2 parts"),
    (dict(optimizer="fo-adam", num_queries=1), "--optimizer fo-adam has gradients"),
    (dict(lr="auto"), "--lr auto is for one process"),
    (dict(parallel="query", shard=""), "--shard: processes that hold parts of one weight"),
    (dict(scheme="probe", shard=""), "--shard and --scheme probe do not go together"),
]


@pytest.mark.slow
@pytest.mark.parametrize("extra, told", BAD, ids=[w[:20] for _, w in BAD])
def test_what_several_processes_cannot_do_is_said_once(places, tmp_path, extra, told):
    words = [w for w in options(places, tmp_path / "run", **extra) if w]
    code, _, errors = torchrun(words)
    assert code != 0
    said = [line for line in errors.splitlines() if line.startswith("zokernels: ")]
    assert len(said) == 1 and told in said[0]
    assert not (tmp_path / "run").exists()


def test_one_refusal_is_enough(places, tmp_path):
    (tmp_path / "own.txt").write_text("mine")
    code, _, errors = torchrun(options(places, tmp_path))
    assert code != 0
    said = [line for line in errors.splitlines() if line.startswith("zokernels: ")]
    assert len(said) == 1 and "is not a run folder" in said[0]


def test_several_processes_are_asked_for_by_their_number(places, tmp_path):
    with pytest.raises(InputError, match="--parallel query divides a step over processes"):
        alone(places, tmp_path / "run", parallel="query")


def test_each_process_takes_a_gpu_of_its_own(places, tmp_path, monkeypatch):
    started = {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="2 were started on a machine that has 1.*--device cpu"):
        alone(places, tmp_path / "run", device="cuda")
    assert not (tmp_path / "run").exists()


def test_means_of_shares_are_the_mean(monkeypatch):
    from zokernels.lab.runs.processes import Processes

    shares = [[1.0, 0.0, 1.0], [0.0], None]
    made = [None if v is None else Mean(sum(v) / len(v), len(v)) for v in shares]
    processes = Processes()
    monkeypatch.setattr(processes, "_gathered", lambda own: made)
    found = processes.mean(None)
    assert (found.value, found.examples) == (0.5, 4)
    assert found.error == pytest.approx(Mean(0.5, 4).error)
