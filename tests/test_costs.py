"""The tables of docs/optimizers.md: the counts are what theory says, and the page is up to date."""

import pytest
import torch

from bench import costs, document, optimizers


@pytest.mark.parametrize("two_sided", [True, False], ids=["two_sided", "one_sided"])
@pytest.mark.parametrize("entry", optimizers.ENTRIES, ids=lambda entry: entry.name)
def test_a_step_costs_what_theory_says(entry, two_sided):
    # Another q than the table's, and the type that doubles a float32 state.
    measured = entry.measured(torch.bfloat16, 2, two_sided)
    theory = entry.theory(torch.bfloat16, 2, two_sided)
    # Temporary memory also holds activations, losses and seeds, all of them small here.
    assert abs(measured.temporary - theory.temporary) <= entry.slack
    exact = ("forwards", "perturbing", "updating", "directions", "state")
    assert [getattr(measured, f) for f in exact] == [getattr(theory, f) for f in exact]


def test_the_page_shows_the_committed_rows_of_every_optimizer():
    rows = document.read_rows(optimizers.RESULTS)
    assert [*dict.fromkeys(r["optimizer"] for r in rows)] == [e.name for e in optimizers.ENTRIES]
    assert optimizers.disagreements(rows) == []
    assert optimizers.written(optimizers.PAGE, rows) == optimizers.PAGE.read_text(encoding="utf-8")


def test_a_count_that_differs_from_theory_is_told():
    row = document.read_rows(optimizers.RESULTS)[0]
    (sentence,) = optimizers.disagreements([{**row, "forwards": "7"}])
    assert "forwards is 7.0, theory says 6.0" in sentence
    assert len(optimizers.disagreements([{**row, "temporary": "1", "state": "2"}])) == 2


def test_peak_memory_sees_what_is_freed_again():
    def run():
        torch.ones(1000), torch.ones(3000).sum()

    # The two tensors are alive together, and a sum takes a few bytes more.
    assert 16_000 <= costs.peak(run) < 16_500
