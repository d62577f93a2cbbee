"""A pass that a log of scalars cannot say is refused, and nothing is recorded after it."""

import copy

import pytest
from test_trajectory import Two, X, equal, weights

import zokernels as zk
from zokernels import passes
from zokernels.optim.sgd import step_coefficients

ODD = {
    "offsets": dict(offsets=[0, 3, 0, 7]),
    "each_step": dict(each_step=True),
    "streams": dict(streams=[4, 5, 6, 7]),
    "columns": dict(columns=[3, 0, 3, 0]),
    "columns that are none": dict(columns=[0, 0, 3, 0]),
}


class Special(zk.ZOSGD):
    """Gives its updating pass keywords of its own."""

    own: dict = {}

    def _update(self, group, chosen, seeds, gradients):
        options = {**self._pass_options(group, chosen), **self.own}
        params = [group["params"][i] for i in chosen]
        passes.add_noise_(params, seeds, step_coefficients(group, gradients), **options)


@pytest.mark.parametrize("steps", [0, 2], ids=["first", "later"])
@pytest.mark.parametrize("odd", ODD)
def test_a_pass_that_a_log_cannot_say_ends_the_recording(odd, steps, tmp_path):
    model = Two()
    base, opt = copy.deepcopy(model), Special(model, lr=0.05, seed=3, dist="rank1")
    opt.record(tmp_path / "run")
    for _ in range(steps):
        opt.step(lambda: model(X))
    before = weights(model)
    opt.own = ODD[odd]
    with pytest.raises(zk.TrajectoryError, match="which a trajectory cannot record"):
        opt.step(lambda: model(X))
    opt.own = {}
    # The pass has moved the weights, so that no later step could be made from the log.
    with pytest.raises(zk.TrajectoryError, match="no longer what it says"):
        opt.step(lambda: model(X))
    assert not equal(weights(model), before)
    assert equal(weights(zk.replay(base, tmp_path / "run")), before)


@pytest.mark.parametrize("columns", [[5, 0, 3, 0], [None] * 4, [5, None, None, 0]], ids=str)
def test_what_a_pass_takes_by_itself_may_be_given(columns, tmp_path):
    model = Two()
    base, opt = copy.deepcopy(model), Special(model, lr=0.05, seed=3, dist="rank1")
    opt.own = dict(columns=columns)
    opt.record(tmp_path / "run")
    for _ in range(3):
        opt.step(lambda: model(X))
    opt.trajectory.close()
    assert equal(weights(zk.replay(base, tmp_path / "run")), weights(model))
