"""weight_decay in the Trainer: two groups in place of one, and otherwise the same run."""

import pytest
import torch
from trainers import losses, model_of, same, trainer_of, weights

import zokernels as zk

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]
# 1 − η · NOTHING is 1.
NOTHING = 1e-30


def per_parameter(kind):
    """A mask with numbers or bits of its own for each of the tiny model's parameters."""
    params = [p for p in model_of("llama").parameters() if p.requires_grad]
    some = [0.2 + 0.6 * i / len(params) for i in range(len(params))]
    if kind == "bits":
        generator = torch.Generator().manual_seed(5)
        return zk.masks.Bits([torch.rand(p.shape, generator=generator) < 0.5 for p in params])
    if kind == "random":
        return zk.masks.Random(some, list(range(len(params))))
    return zk.masks.Magnitude(some)


SETTINGS = {
    "layers": {"blocks": "layer"},
    "modules at once": {"blocks": "module", "block_order": "simultaneous"},
    "labels": {"blocks": lambda name: "norm" in name},
    "sparsity": {"sparsity": 0.5},
    "sparsity anew": {"sparsity": 0.5, "resample_every": 2},
    "sparsity of layers": {"sparsity": 0.3, "resample_every": 1, "blocks": "layer"},
    "random mask": {"mask": per_parameter("random")},
    "magnitude mask": {"mask": per_parameter("magnitude")},
    "bits": {"mask": per_parameter("bits")},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_two_groups_make_the_run_of_one(tmp_path, name):
    """Each parameter keeps its stream, its block and its part of the mask."""
    found = []
    for decay in (0.0, NOTHING):
        options = {**SETTINGS[name], "weight_decay": decay}
        trainer = trainer_of(tmp_path, "llama", cls=zk.ZOAdam, options=options, max_steps=3)
        before = weights(trainer)
        trainer.train()
        assert not same(before, weights(trainer))
        found.append((len(trainer.optimizer.param_groups), weights(trainer)))
    assert [count for count, _ in found] == [1, 2]
    assert same(found[0][1], found[1][1])


@pytest.mark.parametrize("name", ["layers", "sparsity anew", "bits"])
def test_the_arguments_decay_shrinks_what_it_is_for_and_nothing_else(tmp_path, name):
    """The loss is constant, so that only the decay moves a weight."""
    trainer = trainer_of(tmp_path, "llama", options=SETTINGS[name], weight_decay=0.5, max_steps=1)
    trainer.compute_loss = lambda model, inputs, **kwargs: model(**inputs).loss * 0
    before, decayed = weights(trainer), set(trainer.get_decay_parameter_names(trainer.model))
    trainer.train()
    assert 0 < len(decayed) < len(before)
    for n, now in weights(trainer).items():
        factors = now[before[n] != 0] / before[n][before[n] != 0]
        shrunk = (factors - (1 - 3e-3 * 0.5)).abs() < 1e-6
        kept = now[before[n] != 0] == before[n][before[n] != 0]
        assert (shrunk | kept).all(), n
        assert shrunk.any() == (n in decayed), n
        # What a mask leaves out keeps its bits, under the decay too.
        assert kept.any() == (n not in decayed or name != "layers"), n


def test_a_sparse_run_with_decay_goes_on_where_it_stopped(tmp_path):
    extra = dict(max_steps=4, save_strategy="steps", save_steps=2, weight_decay=0.1)
    options = {"sparsity": 0.4, "resample_every": 1}
    whole = trainer_of(tmp_path, options=options, **extra)
    whole.train()
    second = trainer_of(tmp_path, options=options, **extra)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights(whole), weights(second))
    assert losses(whole)[2:] == losses(second)[-2:]


def test_a_model_of_matrices_alone_has_one_group(tmp_path):
    model = model_of("llama")
    for name, p in model.named_parameters():
        p.requires_grad_("q_proj" in name)
    trainer = trainer_of(tmp_path, model=model, weight_decay=0.1, max_steps=1)
    trainer.train()
    assert [g["weight_decay"] for g in trainer.optimizer.param_groups] == [0.1]


def test_a_decay_out_of_range_is_refused_before_the_run(tmp_path):
    with pytest.raises(ValueError, match="weight_decay is -0.1"):
        trainer_of(tmp_path, weight_decay=-0.1).train()
