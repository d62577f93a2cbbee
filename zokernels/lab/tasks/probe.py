"""The linear probe: a new linear layer on a frozen model's last hidden state, and its scorer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from zokernels.lab.tasks.errors import InputError
from zokernels.lab.tasks.scoring import Batch, Scorer
from zokernels.lab.tasks.task import Example

WEIGHTS, CONFIG = "probe.safetensors", "probe.json"


class Probe(torch.nn.Module):
    """A frozen model and a trainable linear layer from its hidden state to classes, from zero.

    Args:
        model: A transformers model.
        classes: Number of classes.

    Raises:
        InputError: If the task has no classes.
    """

    def __init__(self, model: Any, classes: int) -> None:
        super().__init__()
        if classes < 2:
            raise InputError(
                "--scheme probe needs a task with label words, whose number is that of its "
                "classes; this task's candidates differ by example."
            )
        self.config = model.config
        # Without its head: the logits of the whole vocabulary would only cost time.
        self.body = model.base_model.requires_grad_(False)
        dtype = next(self.body.parameters()).dtype
        width = model.get_input_embeddings().embedding_dim
        self.linear = torch.nn.Linear(getattr(model.config, "hidden_size", width), classes)
        torch.nn.init.zeros_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)
        self.linear.to(dtype=dtype, device=next(self.body.parameters()).device)
        self.eval()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Scores of the classes from the hidden states' mean with the weights given."""
        states = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        features = (states * weights[..., None].to(states.dtype)).sum(1)
        return self.linear(features).float()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the linear layer, and the name of the model it belongs to."""
        from safetensors.torch import save_file

        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        save_file({n: p.contiguous() for n, p in self.linear.state_dict().items()}, place / WEIGHTS)
        named = {"model": self.config._name_or_path, "classes": self.linear.out_features}
        (place / CONFIG).write_text(json.dumps(named) + "\n", encoding="utf-8")


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
