"""A plain loop by accelerate: its accumulation, its wrapper, and an optimizer outside of both."""

import itertools
import warnings

import pytest
import torch
from torch import nn
from trainers import trainer_of

import zokernels as zk

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]
accelerate = pytest.importorskip("accelerate", reason="pip install 'zokernels[hf]'")


@pytest.fixture
def accelerator():
    """Makes accelerators, whose settings are one state of the process, and takes it back."""

    def reset():
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()

    def make(batches):
        return accelerate.Accelerator(cpu=True, gradient_accumulation_steps=batches)

    reset()
    yield make
    reset()


def task():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    data = torch.utils.data.TensorDataset(torch.randn(24, 6), torch.randint(0, 3, (24,)))
    return model, torch.utils.data.DataLoader(data, batch_size=4)


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def said_by(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [text for w in caught if "accumul" in (text := str(w.message))]


def accumulated(accelerator, rounds=2):
    model, loader = task()
    model, opt, loader = accelerator.prepare(model, zk.ZOSGD(model, lr=1e-3), loader)
    for _ in range(rounds):
        for batch in loader:
            with accelerator.accumulate(model):
                opt.step(lambda batch=batch: loss_of(model, batch))
                opt.zero_grad()


def test_batches_that_never_come_are_told_of_once(accelerator):
    (said,) = said_by(lambda: accumulated(accelerator(3)))
    assert said.startswith("accelerate has gradient_accumulation_steps=3, ")
    assert "opt.step(lambda: sum(model(**part).loss for part in parts) / len(parts))" in said
    assert said_by(lambda: accumulated(accelerator(1))) == []


def test_the_trainer_accumulates_by_itself(accelerator, tmp_path):
    accelerator(3)
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=3, max_steps=2)
    assert said_by(trainer.train) == []


def test_parts_in_one_closure_are_the_batch_of_all(accelerator):
    """The way out: nothing is left out, and nothing is said."""
    found = []
    for size in (4, 12):
        model, loader = task()
        loader = torch.utils.data.DataLoader(loader.dataset, batch_size=size)
        # The optimizer needs no preparing, and gives its loss where it is not wrapped.
        model, loader = accelerator(1).prepare(model, loader)
        opt, batches, losses = zk.ZOSGD(model, lr=1e-1, seed=3), iter(loader), []
        while parts := list(itertools.islice(batches, 12 // size)):
            mean = lambda: sum(loss_of(model, part) for part in parts) / len(parts)  # noqa: B023, E731
            losses.append(opt.step(mean))
        found.append((torch.stack(losses), [p.detach() for p in model.parameters()]))
    # A mean of 4 rows and one of 12 differ by 1e-7, which a weight has over eps and times lr.
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=2e-4)


def test_a_prepared_optimizer_keeps_its_loss_inside(accelerator):
    model, loader = task()
    model, opt, loader = accelerator(1).prepare(model, zk.ZOSGD(model, lr=1e-3), loader)
    batch = next(iter(loader))
    assert opt.step(lambda: loss_of(model, batch)) is None
    loss = opt.optimizer.step(lambda: loss_of(model, batch))
    assert float(loss) == pytest.approx(loss_of(model, batch).item(), rel=1e-2)
    assert opt.param_groups[0]["step"] == 2
