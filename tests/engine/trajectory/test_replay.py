"""Replay: the fine-tuned model from the base and the log, bit for bit, or a refusal by name."""

import copy
import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from conftest import needs_native
from test_trajectory import equal, weights
from tiny import build, environment
from torch import nn

import zokernels as zk
from zokernels.backends import native
from zokernels.estimators import derive_seed
from zokernels.lab.cli import main


class Net(nn.Module):
    """A tied head, odd sizes, a frozen layer, one element alone."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(11, 7)
        self.middle = nn.Linear(7, 7)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.to(dtype)

    def forward(self, x, y):
        h = self.frozen(self.middle(self.embed(x)).tanh()) * self.scale
        return nn.functional.cross_entropy(self.head(h).float(), y)


TOKENS = torch.arange(24) % 11, (torch.arange(24) * 7) % 11


CASES = {
    "plain": (zk.ZOSGD, torch.float32, {}),
    "queries": (zk.ZOSGD, torch.float32, dict(num_queries=3, estimator="one_sided")),
    "population": (
        zk.ZOSGD,
        torch.float32,
        dict(num_queries=4, estimator="population", normalize="std"),
    ),  # fmt: skip
    "running root": (zk.ZOAdam, torch.float32, dict(normalize="ema", clip=0.8, num_queries=2)),
    "rademacher": (zk.ZOSGD, torch.float32, dict(dist="rademacher", maximize=True)),
    "rank1": (zk.ZOSGD, torch.float32, dict(dist="rank1", num_queries=2)),
    "rank1, float16": (zk.ZOSGD, torch.float16, dict(dist="rank1", rounding="stochastic")),
    "rank1, float64": (zk.ZOSGD, torch.float64, dict(dist="rank1", estimator="one_sided")),
    "rank1, random mask": (
        zk.ZOSGD,
        torch.bfloat16,
        dict(dist="rank1", mask=zk.masks.Random([0.3, 0.5, 0.9, 1.0], 7), rounding="stochastic"),
    ),
    "rank1, magnitude mask, sign": (
        zk.ZOSGDSign,
        torch.float32,
        dict(dist="rank1", mask=zk.masks.Magnitude(0.4), num_queries=3),
    ),
    "rank1, momentum": (
        zk.ZOSGDMomentum,
        torch.bfloat16,
        dict(dist="rank1", rounding="stochastic", beta=0.8, state_dtype=torch.bfloat16),
    ),
    "rank1, adam": (
        zk.ZOAdam,
        torch.float32,
        dict(dist="rank1", num_queries=2, bias_correction=True, perturb="paired"),
    ),
    "bfloat16": (zk.ZOSGD, torch.bfloat16, {}),
    "stochastic": (zk.ZOSGD, torch.bfloat16, dict(rounding="stochastic", num_queries=2)),
    "float16": (zk.ZOSGD, torch.float16, dict(rounding="stochastic")),
    "float64": (zk.ZOSGD, torch.float64, {}),
    "random mask": (zk.ZOSGD, torch.float32, dict(mask=zk.masks.Random([0.3, 0.5, 0.9, 1.0], 7))),
    "magnitude mask": (zk.ZOSGD, torch.float32, dict(mask=zk.masks.Magnitude(0.4), num_queries=2)),
    "sign": (zk.ZOSGDSign, torch.float32, dict(num_queries=2)),
    "momentum": (
        zk.ZOSGDMomentum,
        torch.bfloat16,
        dict(rounding="stochastic", beta=0.8, state_dtype=torch.bfloat16),
    ),
    "adam": (
        zk.ZOAdam,
        torch.float32,
        dict(num_queries=2, betas=(0.8, 0.99), adam_eps=1e-7, bias_correction=True),
    ),
}


def make(case):
    kind, dtype, options = CASES[case]
    model = Net(dtype)
    own = {**dict(lr=0.02, eps=3e-3, weight_decay=0.1, seed=5), **options}
    return model, lambda m: kind(m, **own)


def train(case, path, steps=25):
    """A run with a schedule and a bad step: the base model, the weights after each step."""
    model, optimizer = make(case)
    base, opt = copy.deepcopy(model), optimizer(model)
    recorder = opt.record(path)
    after = [weights(model)]
    for step in range(steps):
        advance(model, opt, step)
        after.append(weights(model))
    recorder.close()
    return base, after


def advance(model, opt, step):
    opt.param_groups[0]["lr"] = 0.02 / (1 + step)
    opt.step(lambda: model(*TOKENS) * (float("nan") if step in (6, 7) else 1))


@pytest.mark.parametrize("case", CASES)
def test_replay_gives_every_step_bit_for_bit(case, tmp_path):
    base, after = train(case, tmp_path / "run")
    assert not equal(after[-1], after[0])
    for until, chunk in ((None, 256), (25, 4), (13, 5), (7, 1), (8, 256), (0, 256)):
        model = copy.deepcopy(base)
        assert zk.replay(model, tmp_path / "run", until, chunk=chunk) is model
        assert equal(weights(model), after[-1 if until is None else until])
    numbers = [s.number for s in zk.Trajectory(tmp_path / "run").steps if s.passes is None]
    assert numbers == [6, 7]


@pytest.mark.parametrize("case", CASES)
def test_resume_goes_on_as_if_nothing_had_happened(case, tmp_path):
    base, after = train(case, tmp_path / "run")
    whole = (tmp_path / "run").read_bytes()
    _, optimizer = make(case)
    for until in (0, 8, 20):
        (tmp_path / "again").write_bytes(whole)
        model = copy.deepcopy(base)
        opt = optimizer(model)
        opt.resume(tmp_path / "again", until=until)
        assert opt.bad_steps == (2 if until == 8 else 0)
        for step in range(until, 25):
            advance(model, opt, step)
            assert equal(weights(model), after[step + 1])
        opt.trajectory.close()
        assert (tmp_path / "again").read_bytes() == whole


CHILD = """
import os, sys, torch, test_replay as t, zokernels as zk
for i, (backend, threads, isa) in enumerate(t.ways()):
    torch.set_num_threads(threads)
    os.environ["ZOKERNELS_ISA"] = isa
    model, _ = t.make(sys.argv[3])
    zk.replay(model, sys.argv[1], backend=backend)
    torch.save(t.weights(model), f"{sys.argv[2]}/{i}")
"""


def ways():
    """Backend, threads, instruction set."""
    isas = native.instruction_sets()
    return [("reference", 1, ""), *(("native", n, isa) for n in (1, 2, 3) for isa in isas)]


@needs_native
@pytest.mark.parametrize("case", ["stochastic", "rank1, random mask"])
def test_replay_is_the_same_in_another_process_threads_instruction_set_and_backend(case, tmp_path):
    _, after = train(case, tmp_path / "run")
    env = {**environment(), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CHILD, tmp_path / "run", tmp_path, case]
    subprocess.run(command, check=True, env=env)
    for i, way in enumerate(ways()):
        assert equal(torch.load(tmp_path / str(i), weights_only=True), after[-1]), way


def test_a_mask_that_changes_every_step_costs_eight_bytes(tmp_path):
    """As a sparse method that draws its mask again does."""
    model, optimizer = make("random mask")
    base, opt = copy.deepcopy(model), optimizer(model)
    opt.record(tmp_path / "run")
    for step in range(9):
        opt.param_groups[0]["mask"] = {**opt.param_groups[0]["mask"], "seed": 40 + step}
        opt.step(lambda: model(*TOKENS))
    opt.trajectory.close()
    found = zk.Trajectory(tmp_path / "run")
    assert len(found.passes) == 1
    assert found.mark(9)[0] - found.mark(8)[0] <= 64
    assert equal(weights(zk.replay(base, tmp_path / "run")), weights(model))


def test_groups_and_frozen_moments_replay_in_their_order(tmp_path):
    """Two groups with other rates; a parameter is frozen for some of the steps."""
    model = Net()
    base = copy.deepcopy(model)
    body = [model.embed.weight, model.scale]
    opt = zk.ZOSGD(
        [{"params": body, "lr": 0.01}, {"params": [model.middle.weight], "lr": 0.1}], seed=9
    )
    opt.record(tmp_path / "run")
    for step in range(12):
        model.scale.requires_grad_(step % 5 != 2)
        opt.step(lambda: model(*TOKENS))
    opt.trajectory.close()
    params = [base.embed.weight, base.scale, base.middle.weight]
    zk.replay(params, tmp_path / "run")
    assert equal(params, [model.embed.weight, model.scale, model.middle.weight])


def test_seeds_that_do_not_follow_from_the_step_are_recorded(tmp_path):
    class Elsewhere(zk.ZOSGD):
        def _update(self, group, chosen, seeds, gradients):
            super()._update(group, chosen, [s ^ 1 for s in seeds], gradients)

    model = Net()
    base, opt = copy.deepcopy(model), Elsewhere(model, lr=0.1, seed=2)
    opt.record(tmp_path / "run")
    for _ in range(5):
        opt.step(lambda: model(*TOKENS))
    opt.trajectory.close()
    assert equal(weights(zk.replay(base, tmp_path / "run")), weights(model))


def test_the_documented_format_is_enough_to_replay_without_this_package(tmp_path):
    """Reads the file by docs/reliability.md alone, and makes z by the noise's specification."""
    base, after = train("plain", tmp_path / "run", steps=5)
    data = (tmp_path / "run").read_bytes()
    at, frames = 8, []
    while at < len(data):
        kind, length, _ = struct.unpack_from("<cII", data, at)
        frames.append((kind, data[at + 9 : at + 9 + length]))
        at += 9 + length + 4
    header = json.loads(frames[0][1])
    w = [p.detach().double() for p in base.parameters()]
    (described,) = [json.loads(payload) for kind, payload in frames if kind == b"P"]
    for kind, payload in frames:
        if kind != b"S":
            continue
        number, passes, of, flags, queries, decay, c = struct.unpack("<QHHBHff", payload)
        assert (passes, of, flags, queries) == (1, 0, 0, 1)
        for i in described["parameters"]:
            seed = derive_seed(header["seed"], number, 0)
            z = zk.noise.gaussian(
                w[i].numel(), seed=seed, stream=header["parameters"][i]["stream"]
            ).double()
            acc = (decay * w[i].flatten()).float().double()
            w[i] = (c * z + acc).float().double().reshape(w[i].shape)
    # A binary64 sum rounded to binary32 is not always the fma's result; for these numbers it is.
    assert equal([x.float() for x in w], after[5])


def test_a_model_that_is_not_the_base_is_refused_by_name_before_a_byte_is_written(tmp_path):
    base, after = train("plain", tmp_path / "run", steps=3)

    class More(Net):
        def __init__(self):
            super().__init__()
            self.extra = nn.Parameter(torch.zeros(2))

    other, larger, shaped = copy.deepcopy(base), More(), copy.deepcopy(base)
    other.frozen.bias.data[3] += 1e-6
    shaped.middle = nn.Linear(7, 5)
    missing = copy.deepcopy(base)
    del missing.scale
    tuned = zk.replay(copy.deepcopy(base), tmp_path / "run")
    for model, sentence in (
        (other, "'frozen.bias' is not what it was"),
        (larger, "a parameter 'extra'"),
        (shaped, r"'middle.weight' has shape \[5, 7\], but it had \[7, 7\]"),
        (missing, "no parameter 'scale'"),
        (copy.deepcopy(base).bfloat16(), "has type bfloat16, but it had float32"),
        (tuned, "before any training"),
    ):
        before = weights(model)
        with pytest.raises(zk.TrajectoryError, match=sentence):
            zk.replay(model, tmp_path / "run")
        assert equal(weights(model), before)
    for until in (-1, 4, 2.0, True):
        with pytest.raises(zk.TrajectoryError, match="until is"):
            zk.replay(copy.deepcopy(base), tmp_path / "run", until)
    with pytest.raises(zk.TrajectoryError, match="holds steps 0 to 3"):
        zk.replay(copy.deepcopy(base), tmp_path / "run", 4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(eps=0.1), "eps is 0.1, but it was 0.003"),
        (dict(seed=6), "seed is 6, but it was 5"),
        (dict(num_queries=2), "num_queries is 2, but it was 1"),
    ],
)
def test_a_resume_with_other_settings_is_refused(tmp_path, change, sentence):
    base, _ = train("plain", tmp_path / "run", steps=3)
    before = (tmp_path / "run").read_bytes()
    options = {**dict(lr=0.02, eps=3e-3, weight_decay=0.1, seed=5), **change}
    with pytest.raises(zk.TrajectoryError, match=sentence):
        zk.ZOSGD(base, **options).resume(tmp_path / "run", until=1)
    assert (tmp_path / "run").read_bytes() == before


def test_a_rule_that_does_more_than_passes_is_refused_by_a_sentence(tmp_path):
    class Hybrid(zk.ZOSGD):
        replayable = False

    model = Net()
    opt = Hybrid(model)
    opt.record(tmp_path / "run")
    opt.step(lambda: model(*TOKENS))
    with pytest.raises(zk.TrajectoryError, match="recorded by Hybrid.*can't be replayed"):
        zk.replay(Net(), tmp_path / "run")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, with the weights of an earlier step kept, and one of LoRA."""
    root = tmp_path_factory.mktemp("finished")
    build("bert", root / "bert")
    build("opt", root / "opt")
    rows = "".join(f"a {'good' if i % 2 else 'bad'} film \t{i % 2}\n" for i in range(40))
    for split in ("train", "dev"):
        (root / f"{split}.tsv").write_text("sentence\tlabel\n" + rows)
    common = ["--data", str(root), "--lr", "1e-2", "--batch-size", "4", "--steps", "12"]
    for model, out, extra in (
        ("bert", "run", ["--eval-every", "3", "--keep-best", "--dtype", "bfloat16"]),
        ("opt", "lora", ["--scheme", "lora", "--num-queries", "2", "--schedule", "linear"]),
    ):
        argv = ["finetune", "--model", str(root / model), "--out", str(root / out)]
        assert main([*argv, *common, *extra]) == 0
    return root


@pytest.mark.hf
@pytest.mark.parametrize(("model", "run"), [("bert", "run"), ("opt", "lora")])
def test_the_command_makes_the_saved_model_and_verifies_it(finished, tmp_path, model, run):
    argv = ["replay", str(finished / model), str(finished / run), "--json", str(tmp_path / "j")]
    assert main([*argv, "--out", str(tmp_path / "out"), "--verify"]) == 0
    found = json.loads((tmp_path / "j").read_text())
    metrics = json.loads((finished / run / "metrics.json").read_text())
    assert found["verified"]
    assert found["steps"] == metrics["weights_of_step"]
    for file in (finished / run / "final").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.hf
def test_the_command_refuses_in_one_sentence(finished, tmp_path, capsys):
    base, run = str(finished / "bert"), finished / "run"
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("years of work")
    (tmp_path / "damaged").write_bytes(
        (run / "trajectory.zk").read_bytes()[:-60] + b"x" * 60
    )  # fmt: skip
    out = ["--out", str(tmp_path / "out")]
    for argv, sentence in (
        ([base, str(run)], "--out is missing"),
        ([base, str(tmp_path / "gone"), *out], "There is no run"),
        ([base, str(tmp_path / "full"), *out], "has no trajectory.zk"),
        ([base, str(run), "--out", str(tmp_path / "full")], "is not empty"),
        ([base, str(run), *out, "--until", "13"], "holds steps 0 to 12"),
        ([base, str(tmp_path / "damaged"), *out], "damaged at byte"),
        ([str(finished / "opt"), str(run), *out], "has no parameter"),
        ([str(run / "final"), str(run), *out], "is not what it was"),
        ([base, str(run / "trajectory.zk"), "--verify"], "finished run"),
        ([base, str(run), *out, "--backend", "abacus"], "abacus"),
    ):
        assert main(["replay", *argv]) == 2, argv
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert sentence in err
        assert not (tmp_path / "out").exists()


@pytest.mark.hf
def test_verify_names_the_tensor_that_was_changed(finished, tmp_path, capsys):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(finished / "run", tmp_path / "run")
    file = tmp_path / "run/final/model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[4]
    tensors[name].view(torch.uint8).view(-1)[0] ^= 1
    save_file(tensors, file, {"format": "pt"})
    assert main(["replay", str(finished / "bert"), str(tmp_path / "run"), "--verify"]) == 1
    assert f"Not verified: tensor '{name}'" in capsys.readouterr().err
    file.write_bytes(file.read_bytes()[:-8])
    assert main(["replay", str(finished / "bert"), str(tmp_path / "run"), "--verify"]) == 1
    assert "is damaged" in capsys.readouterr().err
