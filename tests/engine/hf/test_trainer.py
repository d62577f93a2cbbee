"""The Trainer: what it logs, saves, resumes and refuses with a zeroth-order optimizer inside."""

import functools
import math
import subprocess
import sys

import pytest
import torch
from tiny import environment
from trainers import hf, losses, model_of, rows, same, trainer_of, transformers, weights

import zokernels as zk
from zokernels.optim.base import ZOOptimizer

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]


def test_importing_the_package_imports_no_transformers():
    code = "import sys, zokernels; print('transformers' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment()
    )
    assert out.stdout.strip() == "False"


@pytest.mark.parametrize("name", zk.optim.__all__)
def test_every_optimizer_trains_and_logs_its_projected_gradient(tmp_path, name):
    cls = getattr(zk.optim, name)
    assert issubclass(cls, ZOOptimizer)
    trainer = trainer_of(tmp_path, "llama", cls=cls, max_steps=3)
    if name == "ForwardGrad":
        trainer.optimizer_cls_and_kwargs = (cls, {})
    if name == "HybridZO":
        deep = functools.partial(torch.optim.SGD, lr=0.01)
        trainer.optimizer_cls_and_kwargs = (cls, {"split": 1, "fo_optimizer": deep})
    before = weights(trainer)
    trainer.train()
    assert not same(before, weights(trainer))
    norms = [r["grad_norm"] for r in trainer.state.log_history if "grad_norm" in r]
    assert len(norms) == 3
    assert all(n > 0 for n in norms)
    last = trainer.optimizer.optimizer.projected_gradients
    assert norms[-1] == pytest.approx(math.sqrt(sum(d * d for d in last) / len(last)))
    assert not any(p.grad is not None for p in trainer.model.parameters())


@pytest.mark.parametrize("own", [{}, {"dist": "rank1", "perturb": "paired", "points": "all"}])
def test_a_step_is_the_optimizers_own(tmp_path, own):
    """The Trainer with a batch of everything gives the weights of a plain loop."""
    data = rows(4)
    options = {"num_queries": 2, "estimator": "one_sided", "weight_decay": 0.1, **own}
    trainer = trainer_of(
        tmp_path, data=data, options=options, lr_scheduler_type="constant", max_steps=2
    )
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    trainer.train()
    model = model_of("opt").train()
    opt = zk.ZOSGD(model, lr=3e-3, eps=2e-3, num_queries=2, estimator="one_sided", seed=11, **own)
    batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    for _ in range(2):
        shrink = {n: p.detach() * -3e-4 for n, p in model.named_parameters() if n in decayed}
        opt.step(lambda: model(**batch).loss)
        with torch.no_grad():
            for n, p in model.named_parameters():
                p += shrink.get(n, 0.0)
    for (n, got), want in zip(weights(trainer).items(), model.parameters(), strict=True):
        # Order of rows and of the decay's rounding: a few ulp of weights near 1, and of the loss
        # (1e-6) divided by eps 2e-3 times lr 3e-3.
        torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=2e-5, msg=n)


@pytest.mark.parametrize("length", [7, "mixed"])
def test_accumulation_is_exact(tmp_path, length):
    """Eight rows at once, and four micro-batches of two, by the same direction."""
    data = rows(8)
    if length == "mixed":
        for i, row in enumerate(data):
            row["labels"][: i % 5] = -100
    found = []
    for size, parts in ((8, 1), (2, 4)):
        trainer = trainer_of(
            tmp_path / str(size),
            data=data,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            max_steps=2,
        )
        trainer.train()
        found.append((weights(trainer), losses(trainer)))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)
    for n in found[0][0]:
        # The loss is right to 1e-6; divided by eps 2e-3 and times lr 3e-3 and |z| < 6.
        torch.testing.assert_close(found[0][0][n], found[1][0][n], rtol=0, atol=5e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_resumed_run_ends_bit_for_bit_like_a_whole_one(tmp_path, schedule):
    extra = dict(lr_scheduler_type=schedule, max_steps=6, save_strategy="steps", save_steps=3)
    whole = trainer_of(tmp_path / "run", **extra)
    whole.train()
    second = trainer_of(tmp_path / "run", **extra)
    second.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    assert same(weights(whole), weights(second))
    assert losses(whole)[3:] == losses(second)[-3:]
    group = second.optimizer.param_groups[0]
    assert group["step"] == 6
    assert group["seed"] == 11


def test_a_save_after_a_step_holds_the_unperturbed_weights(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    now = weights(trainer)
    assert all(torch.equal(p, now[n]) for n, p in saved.named_parameters())


def test_evaluation_and_callbacks_run_between_the_steps(tmp_path):
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((state.global_step, kwargs["lr_scheduler"].get_last_lr()[0]))

    trainer = trainer_of(tmp_path, eval_strategy="steps", eval_steps=2)
    trainer.add_callback(Watch())
    trainer.train()
    assert [s for s, _ in seen] == [1, 2, 3, 4]
    assert [lr for _, lr in seen] == pytest.approx([2.25e-3, 1.5e-3, 0.75e-3, 0.0])
    assert sum("eval_loss" in r for r in trainer.state.log_history) == 2


def test_lora_moves_the_adapter_only(tmp_path):
    peft = pytest.importorskip("peft")
    base = model_of("llama")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    trainer = trainer_of(tmp_path, model=model)
    before = weights(trainer)
    trainer.train()
    moved = {n for n, w in weights(trainer).items() if not torch.equal(w, before[n])}
    assert moved
    assert all("lora_" in n for n in moved)


def test_bf16_autocast_sees_both_sides(tmp_path):
    """A cache of casted weights would make the two sides equal and the slope zero."""
    trainer = trainer_of(tmp_path, bf16=True, options={"eps": 0.05}, max_steps=2)
    before = weights(trainer)
    trainer.train()
    assert trainer.optimizer.optimizer.projected_gradients[0] != 0
    assert not same(before, weights(trainer))


def test_a_loss_that_is_not_finite_is_counted_in_the_log(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=3)
    whole, calls = trainer.compute_loss, []

    def compute_loss(*args, **kwargs):
        calls.append(1)
        return whole(*args, **kwargs) * (math.nan if len(calls) == 3 else 1)

    trainer.compute_loss = compute_loss
    trainer.train()
    counted = [r.get("non_finite_steps") for r in trainer.state.log_history if "loss" in r]
    assert counted == [None, 1, None]


def test_what_cannot_work_is_refused_with_the_way_out(tmp_path):
    model = model_of("opt")
    args = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="optimizer_cls_and_kwargs"):
        hf.ZOTrainer(model=model, args=args, optimizers=(zk.ZOSGD(model), None))
    args.fp16 = True
    with pytest.raises(ValueError, match="dtype=torch.float16"):
        hf.ZOTrainer(model=model, args=args)
    trainer = trainer_of(tmp_path, cls=torch.optim.SGD)
    with pytest.raises(TypeError, match="must be one of zokernels' optimizers"):
        trainer.train()


def test_bases_in_the_wrong_order_raise_when_the_class_is_made():
    with pytest.raises(TypeError, match="put the mixin first"):
        type("Wrong", (transformers.Trainer, hf.ZOTrainerMixin), {})

    class Mine(transformers.Trainer):
        def training_step(self, *args, **kwargs):
            return super().training_step(*args, **kwargs)

    with pytest.raises(TypeError, match="Mine comes before ZOTrainerMixin"):
        type("Wrong", (Mine, hf.ZOTrainerMixin), {})
    right = type("Right", (hf.ZOTrainerMixin, Mine), {})
    assert right.training_step is hf.ZOTrainerMixin.training_step
