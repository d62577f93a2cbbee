"""What docs/optimizers.md says of costs: the counts are what theory says."""

import pytest
import torch

from bench import costs, hybrid, optimizers
from bench.entries import ENTRIES
from zokernels.lab.benchmarks import results


@pytest.mark.parametrize("two_sided", [True, False], ids=["two_sided", "one_sided"])
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_step_costs_what_theory_says(entry, two_sided):
    # Another q than the table's, and the type that doubles a float32 state.
    measured = entry.measured(torch.bfloat16, 2, two_sided)
    theory = entry.theory(torch.bfloat16, 2, two_sided)
    # Temporary memory also holds activations, losses and seeds, all of them small here.
    assert abs(measured.temporary - theory.temporary) <= entry.slack
    exact = ("forwards", "perturbing", "updating", "directions", "state")
    assert [getattr(measured, f) for f in exact] == [getattr(theory, f) for f in exact]


def test_the_committed_rows_are_of_every_optimizer_and_as_theory_says():
    rows = results.read(optimizers.RESULTS)
    assert [*dict.fromkeys(r["optimizer"] for r in rows)] == [e.name for e in ENTRIES]
    assert optimizers.disagreements(rows) == []


def test_a_count_that_differs_from_theory_is_told():
    row = results.read(optimizers.RESULTS)[0]
    (sentence,) = optimizers.disagreements([{**row, "forwards": "7"}])
    assert "forwards is 7.0, theory says 6.0" in sentence
    assert len(optimizers.disagreements([{**row, "temporary": "1", "state": "2"}])) == 2


def test_peak_memory_sees_what_is_freed_again():
    def run():
        torch.ones(1000), torch.ones(3000).sum()

    # The two tensors are alive together, and a sum takes a few bytes more.
    assert 16_000 <= costs.peak(run) < 16_500


def test_a_hybrid_stores_the_deep_parts_share():
    rows = results.read(hybrid.RESULTS)
    # The layers are equal; the embeddings and the head keep about a hundredth.
    for row in rows[1:]:
        assert abs(float(row["share"]) - (1 - int(row["split"]) / hybrid.LAYERS)) < 0.01


def test_what_a_backward_stores_is_counted_without_the_weights_and_once():
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    x = torch.ones(3, 6)
    # The input, and the output of tanh, which its own derivative and the next layer share.
    assert hybrid.stored(net, lambda: net(x).sum().backward()) == 4 * (3 * 6 + 3 * 5)
