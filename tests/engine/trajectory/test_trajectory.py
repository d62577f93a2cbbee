"""The log of a run: what survives a cut at any byte, and what is refused."""

import copy
import errno
import os
import resource
import subprocess
import sys

import pytest
import torch
from conftest import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import environment
from torch import nn

import zokernels as zk
from zokernels.trajectory import format as form
from zokernels.trajectory import writer as writing
from zokernels.trajectory.format import Scalars, Step

STEPS = 7


class Two(nn.Module):
    """Odd sizes, and a part that stays frozen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 3), nn.Linear(3, 1)
        self.still = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x):
        return self.second(self.first(x).tanh()).square().mean()


X = torch.linspace(-1, 1, 35).reshape(7, 5)


def run(path, steps=STEPS, **options):
    """A recorded run: the base model, the trained one, and the weights after each step."""
    model = Two()
    base = copy.deepcopy(model)
    opt = zk.ZOSGD(model, **{"lr": 0.05, "weight_decay": 0.1, "seed": 3, **options})
    opt.record(path)
    after = [weights(model)]
    for _ in range(steps):
        opt.step(lambda: model(X))
        after.append(weights(model))
    opt.trajectory.close()
    return base, model, after


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("recorded") / "run.zk"
    base, _, after = run(path)
    return path.read_bytes(), base, after


def test_a_step_and_query_take_at_most_64_bytes(tmp_path):
    for queries in (1, 2, 5):
        sizes = []
        for steps in (10, 30):
            path = tmp_path / f"{queries}-{steps}"
            run(path, steps, num_queries=queries)
            sizes.append(path.stat().st_size)
        assert (sizes[1] - sizes[0]) / 20 <= 64 * queries
        # The first step brings the description of the pass with it; no later one does.
        assert len(zk.Trajectory(path).passes) == 1


def test_the_header_says_what_the_run_was(tmp_path):
    run(tmp_path / "a", eps=0.02, num_queries=2)
    header = zk.Trajectory(tmp_path / "a").header
    assert (header["version"], header["noise"], header["optimizer"]) == (1, 1, "ZOSGD")
    assert (header["seed"], header["groups"][0]["eps"]) == (3, 0.02)
    first = header["parameters"][0]
    assert (first["name"], first["shape"], first["dtype"]) == ("first.weight", [3, 5], "float32")
    # Frozen parameters keep their stream, and are checked as a part of the base model.
    assert [p["stream"] for p in header["parameters"]] == [0, 1, 2, 3, 4, 5]


def test_a_cut_at_any_byte_loses_at_most_the_record_it_is_in(recorded, tmp_path):
    """What is left is the longest whole prefix: never a refusal, never another model."""
    data, base, after = recorded
    path = tmp_path / "cut.zk"
    path.write_bytes(data)
    whole = zk.Trajectory(path)
    ends = [whole.mark(step)[0] for step in range(STEPS + 1)]
    for size in [*range(0, ends[0], 41), *range(ends[0], len(data))]:
        path.write_bytes(data[:size])
        if size < ends[0]:
            with pytest.raises(zk.TrajectoryError, match=r"nothing was recorded|not a trajectory"):
                zk.Trajectory(path)
            continue
        found = zk.Trajectory(path)
        assert found.end == max(step for step, end in enumerate(ends) if end <= size)
    path.write_bytes(data[: ends[4] + 9])
    model = copy.deepcopy(base)
    with pytest.warns(UserWarning, match="cut short"):
        zk.replay(model, path)
    assert equal(weights(model), after[4])


def test_zeros_left_by_a_power_cut_are_a_torn_tail(recorded, tmp_path):
    """A file system may know a file's new length before it has the bytes."""
    data, _, _ = recorded
    path = tmp_path / "zeros.zk"
    path.write_bytes(data)
    last = zk.Trajectory(path).mark(STEPS - 1)[0]
    for written in (0, 3, 11, len(data) - last - 4):
        path.write_bytes(data[: last + written] + b"\0" * (len(data) - last - written + 100))
        assert zk.Trajectory(path).end == STEPS - 1


@pytest.mark.filterwarnings("ignore:The last record of")
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_damage_gives_a_wrong_model(recorded, tmp_path_factory, draw):
    """Flipped, cut, inserted, repeated bytes: a documented refusal, or a whole prefix."""
    data, base, after = recorded
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 3))):
        at = draw.draw(st.integers(0, max(0, len(damaged) - 1)))
        kind = draw.draw(st.sampled_from(["flip", "cut", "insert", "remove", "repeat"]))
        size = draw.draw(st.integers(1, 60))
        if kind == "flip" and damaged:
            damaged[at] ^= draw.draw(st.integers(1, 255))
        elif kind == "cut":
            del damaged[at:]
        elif kind == "insert":
            damaged[at:at] = draw.draw(st.binary(min_size=1, max_size=60))
        elif kind == "remove":
            del damaged[at : at + size]
        else:
            damaged[at:at] = damaged[at : at + size]
    path = tmp_path_factory.getbasetemp() / "damaged.zk"
    path.write_bytes(damaged)
    model = copy.deepcopy(base)
    try:
        found = zk.Trajectory(path)
        zk.replay(model, path)
    except zk.TrajectoryError:
        assert equal(weights(model), weights(base))
    else:
        assert equal(weights(model), after[found.end])


def test_damage_in_the_middle_is_refused_with_its_place(recorded, tmp_path):
    data, _, _ = recorded
    path = tmp_path / "damaged.zk"
    path.write_bytes(data)
    at = zk.Trajectory(path).mark(2)[0]
    for offset in range(at, zk.Trajectory(path).mark(3)[0]):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 0x10]) + data[offset + 1 :])
        with pytest.raises(zk.TrajectoryError, match=f"damaged at byte {at}.*2 steps before"):
            zk.Trajectory(path)


def test_a_record_lost_or_repeated_in_the_middle_is_noticed(recorded, tmp_path):
    """Each record's own checksum is right; the chain of them is not."""
    data, _, _ = recorded
    path = tmp_path / "run.zk"
    path.write_bytes(data)
    marks = [zk.Trajectory(path).mark(step)[0] for step in range(STEPS + 1)]
    for changed in (
        data[: marks[3]] + data[marks[4] :],
        data[: marks[4]] + data[marks[3] :],
        data[: marks[3]] + data[marks[4] : marks[5]] + data[marks[3] : marks[4]] + data[marks[5] :],
    ):
        path.write_bytes(changed)
        with pytest.raises(zk.TrajectoryError, match="damaged at byte"):
            zk.Trajectory(path)


@pytest.mark.parametrize(
    ("described", "numbers"),
    [
        ({"parameters": [99]}, {}),
        ({"parameters": [0, 0]}, {}),
        ({"rule": "exec"}, {}),
        ({"dist": "cauchy"}, {}),
        ({"mask": {"kind": "random", "keep": 7, "seed": 0}}, {}),
        ({"states": [["object"]]}, {}),
        ({"rule": "sign", "states": [[]]}, {}),
        ({}, {"of": 1}),
        ({}, {"lr": 0.1}),
        ({}, {"mask_seed": 3}),
        ({}, {"count": 1}),
        ({}, {"coeffs": (float("nan"),)}),
        ({}, {"decay": float("inf")}),
    ],
)
def test_a_forged_record_with_right_checksums_is_refused_before_a_byte_is_written(
    recorded, tmp_path, described, numbers
):
    data, base, _ = recorded
    path = tmp_path / "forged.zk"
    path.write_bytes(data)
    end, check, _ = zk.Trajectory(path).mark(0)
    plain = dict(
        rule="add_noise", parameters=[0], dist="gaussian", rounding="nearest", mask=None,
        numbers={}, states=[],
    )  # fmt: skip
    first, check = form.frame(form.PASS, form.pack_json({**plain, **described}), check)
    scalars = Scalars(**{"of": 0, "decay": 1.0, "coeffs": (1.0,), **numbers})
    second, _ = form.frame(form.STEP, form.pack_step(Step(0, (scalars,)), False), check)
    path.write_bytes(data[:end] + first + second)
    model = copy.deepcopy(base)
    with pytest.raises(zk.TrajectoryError, match="makes no sense"):
        zk.replay(model, path)
    assert equal(weights(model), weights(base))


@pytest.mark.parametrize("field", ["version", "noise"])
def test_another_version_is_refused_by_name(tmp_path, field):
    run(tmp_path / "a")
    header = {**zk.Trajectory(tmp_path / "a").header, field: 2}
    frame, _ = form.frame(form.HEADER, form.pack_json(header), 0)
    (tmp_path / "b").write_bytes(form.MAGIC + frame)
    what = {"version": "trajectory version 2", "noise": "noise version 2"}[field]
    with pytest.raises(zk.TrajectoryError, match=f"{what}.* version 1"):
        zk.Trajectory(tmp_path / "b")


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"ZKTRAJ2\nxxxx", b"ZKTRAJ1\n"])
def test_files_that_are_no_trajectory_are_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(zk.TrajectoryError, match=r"not a trajectory|nothing was recorded"):
        zk.Trajectory(tmp_path / "x")
    with pytest.raises(zk.TrajectoryError, match="cannot be read"):
        zk.Trajectory(tmp_path / "gone")


def test_a_full_disk_loses_nothing_once_there_is_room(tmp_path, monkeypatch):
    """At whatever byte the disk is full, the file stays whole, and the run goes on after it."""
    real, room = os.write, [10**9]

    def write(fd, data):
        taken = bytes(data)[: room[0]]
        if not taken and len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= len(taken)
        return real(fd, taken)

    monkeypatch.setattr(writing.os, "write", write)
    _, _, after = run(tmp_path / "whole")
    for bytes_left in range(0, 120, 7):
        path = tmp_path / f"full-{bytes_left}"
        model = Two()
        base = copy.deepcopy(model)
        opt = zk.ZOSGD(model, lr=0.05, weight_decay=0.1, seed=3)
        opt.record(path)
        done, room[0] = 0, bytes_left
        while done < STEPS:
            try:
                opt.step(lambda model=model: model(X))
            except zk.TrajectoryError as error:
                assert "No space left" in str(error)
                # The step is done, and the file holds those before it.
                assert equal(weights(model), after[done + 1])
                assert (zk.Trajectory(path).end, zk.Trajectory(path).torn) == (done, 0)
                room[0] = 10**9
            done += 1
        opt.trajectory.close()
        assert equal(weights(model), after[STEPS])
        assert zk.Trajectory(path).end == STEPS
        zk.replay(base, path)
        assert equal(weights(base), after[STEPS])


def test_a_limit_of_the_system_on_the_file_leaves_it_whole(tmp_path):
    """RLIMIT_FSIZE in a process of its own: the system itself refuses in the middle of a record."""
    path = tmp_path / "limited"
    code = (
        "import sys, resource, signal, test_trajectory as t, zokernels as zk\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))\n"
        "try: t.run(sys.argv[1], 1000)\n"
        "except zk.TrajectoryError as e: print(e)\n"
    )
    run(tmp_path / "few", 10)
    limit = (tmp_path / "few").stat().st_size + 5
    env = {**environment(), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert "File too large" in done.stdout, done.stderr
    found = zk.Trajectory(path)
    assert (found.end, found.torn) == (10, 0)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_folder_that_cannot_be_written_is_refused_before_anything(tmp_path):
    model = Two()
    before = weights(model)
    opt = zk.ZOSGD(model)
    with pytest.raises(zk.TrajectoryError, match="cannot be begun"):
        opt.record(tmp_path / "gone" / "run.zk")
    assert opt.trajectory is None
    assert equal(weights(model), before)
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(zk.TrajectoryError, match="Permission denied"):
            opt.record(tmp_path / "run.zk")


def test_a_trajectory_replaces_none_and_is_recorded_by_one_process(tmp_path):
    model = Two()
    opt = zk.ZOSGD(model)
    opt.record(tmp_path / "a")
    with pytest.raises(zk.TrajectoryError, match="never replaces"):
        zk.ZOSGD(Two()).record(tmp_path / "a")
    with pytest.raises(zk.TrajectoryError, match="is recording to"):
        zk.ZOSGD(Two()).resume(tmp_path / "a")


def test_an_update_left_half_done_ends_the_recording(tmp_path):
    """Weights that no longer are what the log says must not be recorded on."""

    class Breaking(zk.ZOSGD):
        def _update(self, *args):
            super()._update(*args)
            raise KeyboardInterrupt

    model = Two()
    opt = Breaking(model, lr=0.1)
    opt.record(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        opt.step(lambda: model(X))
    with pytest.raises(zk.TrajectoryError, match="half done by KeyboardInterrupt"):
        opt.step(lambda: model(X))
    assert zk.Trajectory(tmp_path / "a").end == 0


def test_a_mask_of_a_bit_a_weight_is_refused(tmp_path):
    model = Two()
    params = [p for p in model.parameters() if p.requires_grad]
    opt = zk.ZOSGD(params, mask=zk.masks.Bits([torch.ones_like(p).bool() for p in params]))
    with pytest.raises(zk.TrajectoryError, match="Random or Magnitude"):
        opt.record(tmp_path / "a")
    assert not (tmp_path / "a").exists()
