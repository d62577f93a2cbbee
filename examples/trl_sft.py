"""Supervised fine-tuning in TRL's SFTTrainer, trained by forward passes only.

pip install trl
python examples/trl_sft.py facebook/opt-125m
"""

import sys

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import zokernels as zk
from zokernels.hf import ZOTrainerMixin
from zokernels.lab.tasks import data, get_task


class ZOSFTTrainer(ZOTrainerMixin, SFTTrainer):
    """TRL's trainer with a zeroth-order step; the mixin stands first."""


def main(name: str, steps: int = 2000, out: str = "runs/trl-sft") -> float:
    """Trains on prompts and the words that answer them; returns the training loss."""
    task = get_task("sst2")
    rows = [
        {"prompt": task.prompt(e), "completion": task.candidates(e)[e.label]}
        for e in data.load(task).train
    ]
    args = SFTConfig(
        out,
        max_steps=steps,
        learning_rate=1e-6,
        per_device_train_batch_size=16,
        max_length=64,
        logging_steps=10,
        # A forward stores no activations, so that there is nothing to checkpoint.
        gradient_checkpointing=False,
        completion_only_loss=True,
        bf16=False,
    )
    trainer = ZOSFTTrainer(
        name,
        args,
        train_dataset=Dataset.from_list(rows),
        optimizer_cls_and_kwargs=(zk.ZOSGD, {"eps": 1e-3}),
    )
    found = trainer.train().training_loss
    trainer.save_model(out)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
