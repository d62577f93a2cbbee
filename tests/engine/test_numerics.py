"""docs/numerics.md: its claims hold when measured."""

import pytest
import torch

from bench import numerics


@pytest.fixture(scope="module")
def problem():
    return numerics.Problem(torch.bfloat16)


def test_without_rounding_the_estimate_is_the_directional_derivative(problem):
    found = numerics.estimates(problem, 1e-3, "none", "float32", 20)
    # What is left is the third derivative's share, ε²/6, at ε = 1e-3, and float32's 6e-8 / ε.
    assert abs(found["gain"] - 1) < 0.01 and found["noise"] < 0.02


def test_rounding_to_nearest_loses_a_small_perturbation(problem):
    large = numerics.estimates(problem, 3e-3, "nearest", "float32", 20)
    small = numerics.estimates(problem, 1e-5, "nearest", "float32", 20)
    assert abs(large["gain"] - 1) < 5 * large["gain_error"] + 0.02 and large["unmoved"] < 0.1
    assert small["unmoved"] > 0.9 and small["gain"] < 0.5


@pytest.mark.parametrize("way", ["float32", "whole", "vectors"])
def test_along_rank_one_the_estimate_is_the_directional_derivative(problem, way):
    found = numerics.along_rank1(problem, 1e-3, way, 60)
    assert abs(found["gain"] - 1) < 5 * found["gain_error"] + 0.01
    # In bfloat16 that of normals, 0.27; without rounding the third derivative's.
    assert found["noise"] < (0.03 if way == "float32" else 0.4)
    for p, w in zip(problem.narrow.parameters(), problem.weights, strict=True):
        assert torch.equal(p, w) or way == "float32"


@pytest.mark.parametrize("size", [1e-3, 1e-4])
def test_stochastic_rounding_keeps_the_mean_of_a_small_update(problem, size):
    fair = numerics.updates(problem, size, "stochastic", 5)
    lossy = numerics.updates(problem, size, "nearest", 5)
    assert abs(fair["gain"] - 1) < 5 * fair["gain_error"]
    assert lossy["gain"] < 1 - 10 * lossy["gain_error"]


def test_adding_and_subtracting_drifts_and_goes_on_drifting(problem):
    once, often = (numerics.restored(problem, steps) for steps in (1, 30))
    assert once["unmoved"] < 0.9 and often["noise"] > 2 * once["noise"] > 0


def test_the_regression_finds_a_known_gain_and_its_error():
    generator = torch.Generator().manual_seed(0)
    x, e = torch.randn(2, 4000, generator=generator, dtype=torch.float64)
    found = numerics.against((0.5 * x + 0.25 * e).tolist(), x.tolist())
    assert abs(found["gain"] - 0.5) < 5 * found["gain_error"]
    # Of 4000 samples a deviation is known to 1/√8000, 1.1%.
    assert found["gain_error"] == pytest.approx(0.25 / 4000**0.5, rel=0.06)
    assert found["noise"] == pytest.approx(0.25, rel=0.06)
