"""A plain loop by accelerate: its accumulation, its wrapper, and an optimizer outside of both."""

import itertools

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


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"estimator": "one_sided", "num_queries": 2}], ids=str)
@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "alone"])
def test_batches_of_a_step_are_all_seen_and_make_one_step(accelerator, options, prepared):
    steps = 0
    model, loader = task()
    here, opt = accelerator(3), zk.ZOSGD(model, lr=1e-1, seed=3, **options)
    model, loader = here.prepare(model, loader)
    opt = here.prepare(opt) if prepared else opt
    before, losses, seen = weights_of(model), [], []
    for number, batch in enumerate(loader):

        def closure(batch=batch, number=number):
            seen.append(number)
            return loss_of(model, batch)

        with here.accumulate(model):
            losses.append(float(opt.step(closure)))
            opt.zero_grad()
        steps += here.sync_gradients
        moved = not all(map(torch.equal, before, weights_of(model)))
        assert moved == (steps > 0) and opt.param_groups[0]["step"] == steps
    assert steps == 2 and set(seen) == set(range(6))

    # The same step from one closure over all batches.
    twin, data = task()
    whole = zk.ZOSGD(twin, lr=1e-1, seed=3, **options)
    batches, expected = list(data), []
    for parts in (batches[:3], batches[3:]):
        expected.append(
            float(whole.step(lambda parts=parts: sum(loss_of(twin, p) for p in parts) / 3))
        )
    assert losses[2::3] == pytest.approx(expected, rel=1e-5)
    # The mean is taken in another order, which a weight has over eps and times lr.
    torch.testing.assert_close(weights_of(model), weights_of(twin), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: zk.ZOSGDConservative(model),
        lambda model: zk.ForwardGrad(model),
        lambda model: zk.HybridZO(model, 1, lambda p: torch.optim.SGD(p, 0.1), lr=1e-3),
        lambda model: zk.ZOSGD(model, blocks="module"),
    ],
    ids=["conservative", "forward", "hybrid", "blocks"],
)
def test_what_looks_at_a_batch_again_refuses_to_accumulate(accelerator, make):
    model, loader = task()
    model, opt, loader = accelerator(3).prepare(model, make(model), loader)
    before = weights_of(model)
    accelerator(3)
    accelerate.state.GradientState()._set_sync_gradients(False)
    with pytest.raises(RuntimeError, match=r"several batches.*sum\(model\(\*\*part\)"):
        opt.step(lambda: loss_of(model, next(iter(loader))))
    assert all(map(torch.equal, before, weights_of(model)))


def test_the_trainer_accumulates_by_itself(accelerator, tmp_path):
    accelerator(3)
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=3, max_steps=2)
    trainer.train()
    assert trainer.optimizer.param_groups[0]["step"] == 2


def test_a_prepared_optimizer_is_itself_and_returns_its_loss(accelerator):
    model, loader = task()
    opt = zk.ZOSGD(model, lr=1e-3)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1)
    here = accelerator(1)
    model, prepared, loader, schedule = here.prepare(model, opt, loader, schedule)
    assert prepared is opt and not here.optimizer_step_was_skipped
    batch = next(iter(loader))
    loss = prepared.step(lambda: loss_of(model, batch))
    schedule.step()
    assert float(loss) == pytest.approx(loss_of(model, batch).item(), rel=1e-2)
    assert opt.param_groups[0]["lr"] == pytest.approx(1e-4)


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
