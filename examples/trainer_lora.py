"""LoRA inside transformers.Trainer, trained by forward passes only.

python examples/trainer_lora.py facebook/opt-125m
"""

import sys

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import zokernels as zk
from zokernels.hf import ZOTrainer
from zokernels.lab.tasks import data, get_task


def main(name: str, steps: int = 2000, out: str = "runs/trainer-lora") -> float:
    """Trains on prompts that end with the right word, saves the adapter, returns the loss."""
    task = get_task("sst2")
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(name), LoraConfig(r=8))

    def encode(example):
        prompt, answer = task.prompt(example), task.candidates(example)[example.label]
        ids = tokenizer(prompt + answer, truncation=True, max_length=64)["input_ids"]
        # Only the answer counts: its last token here, a whole word.
        return {"input_ids": ids, "labels": [-100] * (len(ids) - 1) + ids[-1:]}

    def collate(rows):
        batch = tokenizer.pad([{"input_ids": r["input_ids"]} for r in rows], return_tensors="pt")
        labels = batch["input_ids"].new_full(batch["input_ids"].shape, -100)
        for i, row in enumerate(rows):
            labels[i, len(row["labels"]) - 1] = row["labels"][-1]
        return {**batch, "labels": labels}

    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        # GPT-2's and Llama's have none. Padded places are masked and have no label, so any will do.
        tokenizer.pad_token = tokenizer.eos_token
    args = TrainingArguments(
        out, max_steps=steps, learning_rate=1e-4, per_device_train_batch_size=16, logging_steps=10
    )
    trainer = ZOTrainer(
        model,
        args,
        data_collator=collate,
        train_dataset=[encode(e) for e in data.load(task).train],
        optimizer_cls_and_kwargs=(zk.ZOSGD, {"eps": 1e-2, "num_queries": 2}),
    )
    found = trainer.train().training_loss
    model.save_pretrained(out)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
