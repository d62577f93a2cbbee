"""Processes that die, the Trainer in two of them, and layouts that do not fit."""

import os
import signal
import subprocess
import sys

import pytest
import ranks
import torch
from test_distributed import HERE, launch, same
from tiny import build, environment

import zokernels as zk


@pytest.mark.hf
def test_the_trainer_and_accelerate_in_two_processes_are_one_run(tmp_path):
    pytest.importorskip("transformers", reason="pip install 'zokernels[hf]'")
    import ranks_hf

    folder = str(build("opt", tmp_path / "model"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(HERE / "ranks_hf.py"), folder, str(tmp_path)],
        env=environment(), capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    results = [torch.load(tmp_path / f"{r}.pt", weights_only=False) for r in range(2)]
    ones = dict(
        trainer=ranks_hf.by_trainer(folder, str(tmp_path / "one"), 8),
        loop=ranks_hf.by_accelerate(folder, 8),
    )
    began = [p.detach() for p in ranks_hf.model_of(folder).parameters()]
    for case, one in ones.items():
        assert same(results[0][case]["weights"], results[1][case]["weights"])
        # The model's loss is float32, whose rounding over ε makes 1e-4 of a slope; weights moved
        # by some 3e-2.
        for a, b in zip(results[0][case]["weights"], one["weights"], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
        moved = [(a - b).abs().max() for a, b in zip(one["weights"], began, strict=True)]
        assert max(moved) > 1e-2
    assert results[0]["trainer"]["logs"] == pytest.approx(ones["trainer"]["logs"], abs=1e-4)
    # Only the first process tells of the run.
    assert done.stdout.count("'train_runtime'") == 1


def test_a_process_that_is_killed_ends_the_run_and_one_goes_on(tmp_path):
    codes = launch(ranks.killed, 2, tmp_path, fine=False)
    assert codes == [1, -signal.SIGKILL]
    # "In seconds", with room for a machine that is busy or stopped for a while.
    error = tmp_path / "error-0"
    assert error.stat().st_mtime - float((tmp_path / "died").read_text()) < 30
    message = error.read_text()
    assert "RankError: Rank 0 of 2 lost another one at step 2: a process died" in message
    path = tmp_path / "run.zk"
    model, straight = ranks.network(torch.float32), ranks.network(torch.float32)
    opt = ranks.make(model, num_queries=2)
    opt.resume(path)
    assert opt.param_groups[0]["step"] == 2
    ranks.train(model, opt, range(2, 5), dtype=torch.float32)
    opt.trajectory.close()
    ranks.train(straight, ranks.make(straight, num_queries=2), range(5), dtype=torch.float32)
    assert same(ranks.weights(model), ranks.weights(straight))


@pytest.mark.parametrize("parallel", ["auto", "data", "query", None, zk.Distributed()])
def test_without_other_processes_nothing_changes(parallel):
    one, other = ranks.network(), ranks.network()
    opt = ranks.make(other, parallel=parallel)
    assert ranks.train(one, ranks.make(one)) == ranks.train(other, opt)
    assert same(ranks.weights(one), ranks.weights(other))
    assert (opt.parallel.rank, opt.parallel.ranks, opt.parallel.bytes_sent) == (0, 1, 0)


def test_torchrun_without_a_process_group_is_noticed(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="init_process_group"):
        ranks.make(ranks.network(), parallel="data")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(data=2), "there are 1"),
        (dict(query=3), "there are 1"),
        (dict(data=0), "at least 1 process"),
        (dict(check_every=-1), "check_every"),
    ],
)
def test_layouts_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        zk.Distributed(**options)


def test_importing_starts_nothing():
    code = (
        "import sys, torch.distributed as d, zokernels;"
        "print(d.is_initialized(), 'torch.distributed.tensor' in sys.modules,"
        " 'torch.distributed.fsdp' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=dict(environment(), PATH=os.environ["PATH"]),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["False"] * 3
