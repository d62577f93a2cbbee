"""A Trainer, and a plain loop by accelerate, in several processes, for test_distributed.py."""

import os
import sys

import torch
import torch.distributed as dist
import transformers

import zokernels as zk
from zokernels.hf import ZOTrainer

OPTIONS = dict(eps=2e-3, seed=4)


def rows(count=32, width=7):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 30, (count, width), generator=generator)
    # Rows of unlike lengths, so that the shares of a batch hold unlike numbers of tokens.
    return [
        {"input_ids": row[: 3 + i % 5], "labels": row[: 3 + i % 5]} for i, row in enumerate(ids)
    ]


def collate(examples):
    width = max(len(e["input_ids"]) for e in examples)

    def padded(key, value):
        return torch.stack(
            [torch.nn.functional.pad(e[key], (0, width - len(e[key])), value=value)
             for e in examples]
        )  # fmt: skip

    ids = padded("input_ids", 1)
    return {"input_ids": ids, "labels": padded("labels", -100), "attention_mask": ids.ne(1).long()}


def model_of(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def by_trainer(folder, out, batch):
    model = model_of(folder)
    args = transformers.TrainingArguments(
        output_dir=out, per_device_train_batch_size=batch, max_steps=4, learning_rate=3e-3,
        logging_steps=2, save_strategy="steps", save_steps=4, use_cpu=True, disable_tqdm=True,
        seed=11, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = ZOTrainer(
        model=model, args=args, train_dataset=rows(), data_collator=collate,
        optimizer_cls_and_kwargs=(zk.ZOSGD, OPTIONS),
    )  # fmt: skip
    trainer.train()
    logs = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return dict(weights=[p.detach().clone() for p in model.parameters()], logs=logs)


def by_accelerate(folder, batch):
    """A loop of one's own; the sampler of equal rows, since the mean is over equal shares."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = model_of(folder)
    opt = zk.ZOSGD(model, lr=3e-3, **OPTIONS)
    equal = [dict(input_ids=r["input_ids"][:3], labels=r["labels"][:3]) for r in rows()]
    loader = torch.utils.data.DataLoader(equal, batch_size=batch, collate_fn=collate)
    wrapped, opt, loader = accelerator.prepare(model, opt, loader)
    for inputs in loader:
        opt.step(lambda inputs=inputs: wrapped(**inputs).loss)
    return dict(weights=[p.detach().clone() for p in model.parameters()])


if __name__ == "__main__":
    folder, out = sys.argv[1:]
    found = dict(trainer=by_trainer(folder, out + "/trainer", 4), loop=by_accelerate(folder, 4))
    torch.save(found, f"{out}/{dist.get_rank()}.pt")
    dist.destroy_process_group()
    sys.stdout.flush()
    # Threads of a group that torch still holds may abort an interpreter that ends by itself.
    os._exit(0)
