"""A trajectory has one writer: of several that begin it, and when a process has children."""

import os
import threading
from unittest import mock

import pytest
import torch
from torch import nn

import zokernels as zk
from zokernels.trajectory import format as form
from zokernels.trajectory.writer import Writer

X = torch.ones(2, 3)


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def test_of_many_that_begin_a_file_at_once_one_has_it(tmp_path):
    header = form.pack_json({"about": "x" * 5000})
    for turn in range(20):
        path, start = tmp_path / f"{turn}.zk", threading.Barrier(4)
        begun, refused = [], []

        def begin(path=path, start=start, begun=begun, refused=refused):
            start.wait()
            try:
                begun.append(Writer.create(path, header))
            except zk.TrajectoryError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=begin) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(begun) == 1 and len(refused) == 3
        assert all("never replaces another" in sentence for sentence in refused)
        begun[0].close()
        assert path.read_bytes() == form.MAGIC + form.frame(form.HEADER, header, 0)[0]
    assert len(list(tmp_path.iterdir())) == 20


def test_a_file_system_without_links_keeps_what_is_there(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    Writer.create(tmp_path / "run.zk", b"{}").close()
    with pytest.raises(zk.TrajectoryError, match="never replaces another"):
        Writer.create(tmp_path / "run.zk", b"{}")
    assert [p.name for p in tmp_path.iterdir()] == ["run.zk"]


def test_steps_recorded_between_a_resumes_read_and_its_writing_are_not_cut_off(tmp_path):
    path = tmp_path / "run.zk"
    first = linear()
    opt = zk.ZOSGD(first, lr=0.1)
    opt.record(path)
    found = zk.Trajectory(path)
    opt.step(lambda: first(X).square().mean())
    opt.trajectory.close()
    late = zk.ZOSGD(linear(), lr=0.1)
    with mock.patch("zokernels.optim.recording.Trajectory", return_value=found):
        with pytest.raises(zk.TrajectoryError, match="since it was read"):
            late.resume(path)
    assert zk.Trajectory(path).end == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with fork")
def test_a_forked_child_neither_writes_nor_keeps_others_from_it(tmp_path):
    """As a worker of a DataLoader, which may outlive the process that recorded."""
    path = tmp_path / "run.zk"
    first = linear()
    opt = zk.ZOSGD(first, lr=0.1)
    opt.record(path)
    opt.step(lambda: first(X).square().mean())
    (hold, let_go), (ready, say) = os.pipe(), os.pipe()
    if not (child := os.fork()):
        os.close(let_go)
        try:
            opt.trajectory.write(1, skipped=True)
        except zk.TrajectoryError:
            os.write(say, b"x")
            os.read(hold, 1)
            os._exit(0)
        os._exit(1)
    os.close(hold)
    os.close(say)
    os.read(ready, 1)
    try:
        opt.trajectory.close()
        second = linear()
        again = zk.ZOSGD(second, lr=0.1)
        again.resume(path)
        again.step(lambda: second(X).square().mean())
        again.trajectory.close()
        assert zk.Trajectory(path).end == 2
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    finally:
        os.close(let_go)
        os.close(ready)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
