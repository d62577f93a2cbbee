"""Which large weights a GPU makes in one pass."""

import torch
from torch import nn

from zokernels.perturb import windows
from zokernels.perturb.windows import Windows

MANY = windows._LEAST


def parameters(*sizes, dtype=torch.float32):
    return [nn.Parameter(torch.empty(size, device="meta", dtype=dtype)) for size in sizes]


def forward(found, order):
    """The passes of a forward that asks in this order."""
    held, passes = set(), []
    found.begin()
    for i in order:
        if i not in held:
            passes.append(found.ask(i))
            held = set(passes[-1])
    return passes


def test_weights_are_made_together_in_the_order_of_the_forward_before():
    found = Windows(parameters(*[MANY // 2] * 5))
    order = [3, 1, 0, 4, 2]
    assert forward(found, order) == [(3,), (1,), (0,), (4,), (2,)]
    for _ in range(3):
        assert forward(found, order) == [(3, 1), (0, 4), (2,)]


def test_a_window_is_no_larger_than_the_largest_weight():
    found = Windows(parameters(3 * MANY, MANY, MANY, MANY, MANY))
    forward(found, range(5))
    assert forward(found, range(5)) == [(0,), (1, 2, 3), (4,)]


def test_a_weight_that_is_never_asked_for_makes_no_window_larger():
    found = Windows(parameters(9 * MANY, MANY, MANY, MANY))
    forward(found, [1, 2, 3])
    assert forward(found, [1, 2, 3]) == [(1,), (2,), (3,)]


def test_a_window_has_one_type():
    found = Windows([*parameters(8, 8), *parameters(8, dtype=torch.bfloat16), *parameters(8)])
    forward(found, range(4))
    assert forward(found, range(4)) == [(0, 1), (2,), (3,)]


def test_a_tied_weight_is_made_wherever_it_is_asked_for():
    found = Windows(parameters(MANY, MANY, MANY))
    order = [0, 1, 2, 0]
    for _ in range(3):
        assert forward(found, order) == [(0,), (1,), (2,), (0,)]


def test_what_a_forward_leaves_out_costs_no_other_window():
    found = Windows(parameters(*[MANY // 2] * 6))
    forward(found, range(6))
    assert forward(found, [0, 1, 4, 5]) == [(0, 1), (4, 5)]
    assert forward(found, range(6)) == [(0, 1), (2, 3), (4, 5)]


def test_another_order_is_learned_and_one_that_never_stays_is_given_up():
    found = Windows(parameters(*[MANY // 2] * 4))
    forward(found, [0, 1, 2, 3])
    assert forward(found, [2, 3, 0, 1]) == [(2, 3), (0,), (1,)]
    forward(found, [2, 1, 3, 0])
    assert forward(found, [2, 1, 3, 0]) == [(2, 1), (3, 0)]
    orders = [[0, 1, 2, 3], [3, 1, 2, 0], [2, 0, 1, 3], [1, 3, 0, 2], [0, 2, 3, 1]]
    for order in orders * 2:
        forward(found, order)
    # From here on each weight alone, whatever the order.
    for order in orders:
        assert forward(found, order) == [(i,) for i in order]


def test_what_is_kept_from_now_on_is_planned_without_and_this_forward_goes_on():
    found = Windows(parameters(*[MANY // 2] * 4))
    forward(found, range(4))
    found.begin()
    assert found.ask(0) == (0, 1)
    found.relearn()
    assert found.ask(2) == (2, 3)
    forward(found, [0, 2, 3])
    assert forward(found, [0, 2, 3]) == [(0, 2), (3,)]
