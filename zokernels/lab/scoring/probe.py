"""Scores by a linear probe."""

from collections.abc import Sequence
from typing import Any

import torch

from zokernels.lab.scoring.scorer import Batch, Scorer
from zokernels.lab.tasks.task import Example


class ProbeScorer(Scorer):
    """Scores by a `Probe`: the state at a causal prompt's end or at the blank, or the mean.

    Args:
        kind: "causal", "masked" or "encoder".
    """

    def __init__(self, *args: Any, kind: str, **kwargs: Any) -> None:
        self.kind = kind
        super().__init__(*args, **kwargs)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """One row an example, with the weights of its tokens."""
        blank = self.tokenizer.mask_token if self.kind == "masked" else None
        if blank is not None:
            texts = [self.task.cloze(e, blank) for e in examples]
        elif self.kind == "encoder":
            plain = self.task.with_template(False)
            texts = [plain.prompt(e) for e in examples]
        else:
            texts = [self.prompt(e) for e in examples]
        number = self.tokenizer.mask_token_id if blank is not None else None
        encoded: list[list[int]] = self.tokenizer(texts, verbose=False)["input_ids"]
        rows = [self._cut(row, number) for row in encoded]
        batch = self.pad(rows)
        weights = torch.zeros(batch["input_ids"].shape, device=self.device)
        for i, row in enumerate(rows):
            if self.kind == "encoder":
                weights[i, : len(row)] = 1 / len(row)
            else:
                weights[i, row.index(number) if number is not None else len(row) - 1] = 1
        batch["weights"] = weights
        batch["labels"] = self._labels(examples)
        return batch

    def scores(self, batch: Batch) -> torch.Tensor:
        """The linear layer's outputs."""
        return self.model(batch["input_ids"], batch["attention_mask"], batch["weights"])
