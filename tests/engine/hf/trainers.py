"""Tiny Trainers by forward passes, for the tests of this folder."""

import pytest
import torch
from tiny import models

import zokernels as zk

transformers = pytest.importorskip("transformers", reason="pip install 'zokernels[hf]'")
hf = pytest.importorskip("zokernels.hf")


def model_of(kind):
    """The same tiny model of a kind at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models()[kind]()


def rows(count=24, width=7):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 30, (count, width), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def arguments_of(out, **extra):
    given = dict(
        output_dir=str(out),
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=11,
    )
    return transformers.TrainingArguments(**{**given, **extra})


def trainer_of(out, kind="opt", model=None, options=None, cls=None, data=None, **extra):
    chosen = (cls or zk.ZOSGD, {"eps": 2e-3, **(options or {})})
    return hf.ZOTrainer(
        model=model or model_of(kind),
        args=arguments_of(out, **extra),
        train_dataset=data or rows(),
        eval_dataset=rows(6),
        optimizer_cls_and_kwargs=chosen,
    )


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def losses(trainer):
    return [r["loss"] for r in trainer.state.log_history if "loss" in r]
