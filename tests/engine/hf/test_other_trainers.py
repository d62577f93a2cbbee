"""The mixin before other Trainers: constructors and training steps that are their own."""

import pytest
import torch
from trainers import arguments_of, hf, model_of, rows, same, trainer_of, transformers, weights

import zokernels as zk

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]
CHOSEN = (zk.ZOSGD, {"eps": 2e-3, "num_queries": 2})


class Preference(transformers.Trainer):
    """A constructor like those of TRL: no optimizer_cls_and_kwargs, and no other keywords."""

    def __init__(self, model, ref_model=None, args=None, train_dataset=None, processing_class=None,
                 callbacks=None, optimizers=(None, None)):  # fmt: skip
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, callbacks=callbacks,
            processing_class=processing_class, optimizers=optimizers,
        )  # fmt: skip
        self.ref_model = ref_model


class WithItsOwn(transformers.Trainer):
    """A constructor that takes the argument, and fills it in where it is missing."""

    def __init__(self, *args, optimizer_cls_and_kwargs=None, **kwargs):
        given = optimizer_cls_and_kwargs or (torch.optim.SGD, {"lr": 1.0})
        super().__init__(*args, optimizer_cls_and_kwargs=given, **kwargs)


@pytest.mark.parametrize("base", [transformers.Trainer, Preference, WithItsOwn])
@pytest.mark.parametrize("when", ["given", "set afterwards"])
def test_every_trainer_takes_the_optimizer(tmp_path, base, when):
    cls = type("Mine", (hf.ZOTrainerMixin, base), {})
    given = {"optimizer_cls_and_kwargs": CHOSEN} if when == "given" else {}
    args = arguments_of(tmp_path, max_steps=2)
    trainer = cls(model_of("opt"), args=args, train_dataset=rows(), **given)
    trainer.optimizer_cls_and_kwargs = CHOSEN
    before = weights(trainer)
    trainer.train()
    assert trainer.optimizer.optimizer.param_groups[0]["num_queries"] == 2
    assert not same(before, weights(trainer))


def test_a_sequence_to_sequence_model_in_its_own_trainer(tmp_path):
    class Mine(hf.ZOTrainerMixin, transformers.Seq2SeqTrainer):
        pass

    shape = dict(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**shape, decoder_start_token_id=0)
    )
    args = transformers.Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=1e-3, use_cpu=True, disable_tqdm=True,
        save_strategy="no", report_to="none",
    )  # fmt: skip
    trainer = Mine(model, args, train_dataset=rows(), optimizer_cls_and_kwargs=CHOSEN)
    before = weights(trainer)
    trainer.train()
    assert len(trainer.optimizer.optimizer.projected_gradients) == 2
    assert not same(before, weights(trainer))


def test_an_optimizer_of_ones_own_is_refused_by_every_trainer(tmp_path):
    cls, model = type("Mine", (hf.ZOTrainerMixin, Preference), {}), model_of("opt")
    with pytest.raises(TypeError, match="optimizer_cls_and_kwargs"):
        cls(model, args=arguments_of(tmp_path), optimizers=(zk.ZOSGD(model), None))


def trained(base, tmp_path, **extra):
    cls = type("Mine", (hf.ZOTrainerMixin, base), {})
    args = arguments_of(tmp_path, **{"max_steps": 2, **extra})
    trainer = cls(model_of("opt"), args=args, train_dataset=rows(), optimizer_cls_and_kwargs=CHOSEN)
    trainer.train()
    return trainer


class Rollouts(transformers.Trainer):
    """As TRL's GRPOTrainer: makes a buffer of batches now and then, and counts its steps."""

    EVERY = 4

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.counted, self.made, self.used = 0, 0, []

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        if self.counted % self.EVERY == 0:
            self.made += 1
            # Each part is known by its first token.
            parts = torch.arange(5, 5 + self.EVERY)
            ids = [torch.cat([p.repeat(4, 1), inputs["input_ids"][:, 1:]], 1) for p in parts]
            self.buffer = [{"input_ids": part, "labels": part.clone()} for part in ids]
        return self.buffer[self.counted % self.EVERY]

    def compute_loss(self, model, inputs, **kwargs):
        self.used.append(int(inputs["input_ids"][0, 0]))
        return super().compute_loss(model, inputs, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.counted += 1
        return loss


def test_what_a_training_step_does_besides_is_done(tmp_path):
    trainer = trained(Rollouts, tmp_path, gradient_accumulation_steps=2, max_steps=4)
    assert (trainer.counted, trainer.made) == (8, 2)
    # Two queries, two sides: four forwards over both parts of a step.
    assert trainer.used == 2 * ([5, 6] * 4 + [7, 8] * 4)


class Halved(transformers.Trainer):
    """Weighs the loss in a training step that calls no other."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=None)
        loss *= 0.5
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_loss_counts_by_the_factor_that_a_training_step_gives_it(tmp_path):
    whole, half = (trained(base, tmp_path, max_steps=1) for base in (transformers.Trainer, Halved))
    slopes = [t.optimizer.optimizer.projected_gradients for t in (whole, half)]
    # Not to the bit: the model divides the whole one by the number of items, the half one by none.
    assert slopes[1] == pytest.approx([d / 2 for d in slopes[0]], rel=1e-2)


class Elsewhere(transformers.Trainer):
    """Has its loss from a function of its own, like TRL's OnlineDPOTrainer."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(**self._prepare_inputs(inputs)).loss
        self.accelerator.backward(loss)
        return loss.detach()


class Penalized(transformers.Trainer):
    """Adds to the loss where compute_loss does not see it."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss = loss + sum(p.square().sum() for p in model.parameters())
        self.accelerator.backward(loss)
        return loss.detach()


class WithOutputs(transformers.Trainer):
    """Makes a loss of the outputs too."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        self.accelerator.backward(loss + outputs.logits.mean())
        return loss.detach()


class Unused(transformers.Trainer):
    """Never says how the loss counts."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        return self.compute_loss(model, self._prepare_inputs(inputs)).detach()


@pytest.mark.parametrize("base", [Elsewhere, Penalized, WithOutputs, Unused])
def test_a_loss_that_compute_loss_does_not_give_is_refused(tmp_path, base):
    with pytest.raises(TypeError, match=rf"{base.__name__}.training_step .* compute_loss\(model"):
        trained(base, tmp_path)


def test_a_loss_of_ones_own_in_a_subclass(tmp_path):
    class Flat(hf.ZOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(input_ids=inputs.pop("input_ids")).logits.square().mean()

    trainer = Flat(model_of("opt"), arguments_of(tmp_path, max_steps=8), train_dataset=rows())
    trainer.train()
    found = [r["loss"] for r in trainer.state.log_history if "loss" in r]
    assert found[-1] < found[0]


def test_training_under_no_grad_is_the_same(tmp_path):
    found = []
    for grad in (True, False):
        trainer = trainer_of(tmp_path, max_steps=2)
        with torch.set_grad_enabled(grad):
            trainer.train()
        found.append(weights(trainer))
    assert same(*found)
    trainer = trainer_of(tmp_path, max_steps=2)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="use torch.no_grad instead"):
        trainer.train()


def test_a_run_that_stops_between_two_micro_batches_leaves_none_to_the_next(tmp_path):
    class Stop(transformers.TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    found = []
    for stopped in (False, True):
        trainer = trainer_of(tmp_path, gradient_accumulation_steps=2, max_steps=2)
        if stopped:
            trainer.add_callback(Stop)
            assert trainer.train().global_step == 0
            trainer.remove_callback(Stop)
        trainer.train()
        found.append(weights(trainer))
    assert same(*found)


@pytest.mark.parametrize("given", [zk.ZOSGD, (zk.ZOSGD,), (zk.ZOSGD, None)], ids=str)
def test_a_class_alone_is_a_class_without_options(given, tmp_path):
    trainer = hf.ZOTrainer(
        model_of("opt"), arguments_of(tmp_path, max_steps=1), train_dataset=rows(),
        optimizer_cls_and_kwargs=given,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 1


def test_an_optimizer_that_a_trainer_makes_otherwise_is_a_sentence(tmp_path):
    class Own(hf.ZOTrainer):
        def create_optimizer(self, *_):
            self.optimizer = zk.ZOSGD(self.model, lr=1e-2)
            return self.optimizer

    trainer = Own(model_of("opt"), arguments_of(tmp_path, max_steps=1), train_dataset=rows())
    with pytest.raises(TypeError, match="create_optimizer made a ZOSGD.*optimizer_cls_and_kwargs"):
        trainer.train()
