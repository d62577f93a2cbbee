"""The line of a run's mean loss: no jump where it begins, nothing made of what is not finite."""

import math

from zokernels.lab.runs.report import smoothed

NAN = math.nan


def test_the_line_does_not_begin_with_one_steps_loss():
    found = smoothed([14.0] + [1.0] * 99, reach=12)
    assert found[0] == 2.0 and found[12] == 1.52 and found[13] == 1.0
    assert len(found) == 100


def test_it_does_not_lag_behind_a_loss_that_falls():
    losses = [100.0 - step for step in range(101)]
    assert smoothed(losses, reach=10)[10:-10] == losses[10:-10]


def test_losses_that_are_not_finite_are_passed_over():
    assert smoothed([1.0, NAN, 3.0, math.inf, 5.0], reach=1) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert all(math.isnan(x) for x in smoothed([NAN, NAN], reach=1))
    assert smoothed([], reach=1) == []
    # Added up from the beginning, what follows would be lost beside the first.
    assert smoothed([1e30, 1.0, 2.0, 3.0], reach=1)[2:] == [2.0, 2.5]
