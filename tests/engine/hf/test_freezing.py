"""What is trainable changes in the course of a run: callbacks that freeze, and adapters."""

import warnings

import pytest
import torch
from trainers import model_of, trainer_of, transformers, weights

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]
PART = "layers.1."
# A sentence about what no group holds is another change's; whoever merges the two takes this away.


class Switch(transformers.TrainerCallback):
    """Sets whether a part is trainable, after the second step."""

    def __init__(self, flag):
        self.flag, self.seen = flag, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        part = [p for n, p in model.named_parameters() if PART in n]
        self.seen.append([p.detach().clone() for p in part])
        if state.global_step == 2:
            for p in part:
                p.requires_grad_(self.flag)


def moved(before, after):
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_callback_that_freezes_a_layer_and_one_that_thaws_it_again(tmp_path):
    trainer, freeze = trainer_of(tmp_path, "llama", max_steps=4), Switch(False)
    trainer.add_callback(freeze)
    trainer.train()
    assert [moved(*pair) for pair in zip(freeze.seen, freeze.seen[1:], strict=False)] == [
        True, False, False,
    ]  # fmt: skip
    # In a second run of the same optimizer, which holds the layer.
    trainer.remove_callback(freeze)
    thaw = Switch(True)
    trainer.add_callback(thaw)
    trainer.train()
    assert [moved(*pair) for pair in zip(thaw.seen, thaw.seen[1:], strict=False)] == [
        False, True, True,
    ]  # fmt: skip


def test_gradual_unfreezing_begins_by_freezing_at_the_begin_of_the_run(tmp_path):
    class Late(Switch):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            for n, p in model.named_parameters():
                p.requires_grad_(PART not in n)

    trainer, late = trainer_of(tmp_path, "llama", max_steps=4), Late(True)
    trainer.add_callback(late)
    trainer.train()
    assert [moved(*pair) for pair in zip(late.seen, late.seen[1:], strict=False)] == [
        False, True, True,
    ]  # fmt: skip


def test_a_layer_that_was_frozen_before_the_run_is_trained_or_told_of(tmp_path):
    model = model_of("llama")
    for name, p in model.named_parameters():
        p.requires_grad_(PART not in name)
    trainer, thaw = trainer_of(tmp_path, model=model, max_steps=4), Switch(True)
    trainer.add_callback(thaw)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.train()
    assert moved(thaw.seen[1], thaw.seen[-1]) or any(PART in str(w.message) for w in said)


def two_adapters():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model_of("llama"), config, adapter_name="first")
    model.add_adapter("second", config)
    return model


def names_moved(before, now):
    return {name.split(".")[-2] for name in now if not torch.equal(before[name], now[name])}


def test_an_optimizer_that_is_made_again_holds_the_adapter_that_was_switched_to(tmp_path):
    trainer, found = trainer_of(tmp_path, model=two_adapters(), max_steps=1), []
    for adapter in ("first", "second"):
        trainer.model.set_adapter(adapter)
        trainer.optimizer = None
        before = weights(trainer)
        trainer.train()
        found.append(names_moved(before, weights(trainer)))
    assert found == [{"first"}, {"second"}]


def test_an_adapter_switched_between_two_runs_is_trained_or_told_of(tmp_path):
    trainer = trainer_of(tmp_path, model=two_adapters(), max_steps=1)
    trainer.train()
    trainer.model.set_adapter("second")
    before = weights(trainer)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            trainer.train()
        except ValueError as error:
            warnings.warn(str(error), stacklevel=1)
    told = any(".second." in str(w.message) for w in said)
    assert told or "second" in names_moved(before, weights(trainer))
