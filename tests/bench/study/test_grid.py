"""The rates that the study runs a cell at, one after another."""

import math

import pytest

from bench.study import grid


def walk(loss, first, limit=20):
    """The runs of a cell whose loss is a function of rate and seed, in their order."""
    runs = []
    while (wanted := grid.missing(runs, first)) is not None:
        rate, seed = wanted
        runs.append({"lr": f"{rate:g}", "seed": str(seed), "loss_after": str(loss(rate, seed))})
        assert len(runs) < limit
    return runs


@pytest.mark.parametrize("first", [1e-6, 1e-4, 1e-3])
def test_it_walks_to_the_best_rate_and_repeats_that(first):
    runs = walk(lambda rate, seed: abs(math.log10(rate) + 4) + seed, first)
    assert [run["seed"] for run in grid.at_best(runs)] == ["0", "1", "2"]
    assert {run["lr"] for run in grid.at_best(runs)} == {"0.0001"}
    tried = {float(run["lr"]) for run in runs}
    assert {3e-5, 1e-4, 3e-4} <= tried
    assert len(runs) == len(tried) + 2


def test_a_destroyed_run_is_never_the_best():
    runs = walk(lambda rate, seed: math.nan if rate > 2e-4 else -math.log10(rate), 3e-4)
    assert {run["lr"] for run in grid.at_best(runs)} == {"0.0001"}


def test_what_other_seeds_came_to_does_not_choose():
    runs = walk(lambda rate, seed: abs(math.log10(rate) + 4) + 9 * (seed == 1), 1e-4)
    assert {run["lr"] for run in grid.at_best(runs)} == {"0.0001"}
    assert grid.missing(runs, 1e-4) is None


def test_the_end_of_the_grid_needs_one_neighbour_only():
    runs = walk(lambda rate, seed: rate, grid.RATES[1])
    assert grid.at_best(runs)[0]["lr"] == f"{grid.RATES[0]:g}"
