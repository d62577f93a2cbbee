"""Scores of the labels under a model: one class for each kind of model.

A scorer turns examples into a batch of tensors (``collate``) and a batch into a float32 tensor of
scores, one row an example and one column a label (``scores``). The loss is their cross-entropy and
the answer their argmax, for every kind.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from zokernels.tasks.errors import InputError
from zokernels.tasks.sst2 import Example, Task

Batch = dict[str, torch.Tensor]
_SCALE = 20.0


class Scorer:
    """What the three kinds share.

    Args:
        model: A transformers model, perhaps inside an adapter.
        tokenizer: Its tokenizer.
        task: Prompts and label words.
        max_length: Longest row in tokens; a longer one loses the start of its sentence, so that
            the prompt and the blank stay.
    """

    def __init__(self, model: Any, tokenizer: Any, task: Task, max_length: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.task = task
        self.max_length = max_length
        self.device = next(model.parameters()).device
        self._prepare()

    def _prepare(self) -> None:
        """Work that is done once; a subclass may need some."""

    def collate(self, examples: Sequence[Example]) -> Batch:
        """The tensors of a batch."""
        raise NotImplementedError

    def scores(self, batch: Batch) -> torch.Tensor:
        """Scores of shape (examples, labels), float32."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy of the scores, a float32 scalar."""
        return F.cross_entropy(self.scores(batch), batch["labels"])

    def _encode(self, texts: list[str]) -> list[list[int]]:
        rows: list[list[int]] = self.tokenizer(texts, verbose=False)["input_ids"]
        return [self._cut(row) for row in rows]

    def _cut(self, row: list[int]) -> list[int]:
        over = len(row) - self.max_length
        if over <= 0:
            return row
        lead = 1 if row[0] in self.tokenizer.all_special_ids else 0
        return row[:lead] + row[lead + over :]

    def _pad(self, rows: list[list[int]]) -> Batch:
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id, dtype=torch.long)
        seen = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            seen[i, : len(row)] = 1
        return {"input_ids": ids.to(self.device), "attention_mask": seen.to(self.device)}

    def _labels(self, examples: Sequence[Example]) -> torch.Tensor:
        return torch.tensor([e.label for e in examples], device=self.device)


class CausalScorer(Scorer):
    """The mean log-probability of each candidate's tokens after the prompt."""

    def _prepare(self) -> None:
        inner = getattr(self.model, "get_base_model", lambda: self.model)()
        self._can_trim = "logits_to_keep" in inspect.signature(inner.forward).parameters

    def collate(self, examples: Sequence[Example]) -> Batch:
        """One row a candidate, or one an example where every candidate is a single token."""
        prompts = [self.task.prompt(e.sentence) for e in examples]
        tails = self.task.candidates()
        heads: list[list[int]] = self.tokenizer(prompts, verbose=False)["input_ids"]
        whole: list[list[int]] = self.tokenizer(
            [prompt + tail for prompt in prompts for tail in tails], verbose=False
        )["input_ids"]
        rows, targets = [], []
        for i, head in enumerate(heads):
            options = whole[i * len(tails) : (i + 1) * len(tails)]
            common = _common_prefix([head, *options])
            for option in options:
                start = min(common, len(option) - 1)
                targets.append(option[start:])
                rows.append(self._cut(option[:-1]))
        if all(len(target) == 1 for target in targets):
            rows = rows[:: len(tails)]
        batch = self._pad(rows)
        lengths = [len(target) for target in targets]
        widest = max(lengths)
        places, tokens, weights = [], [], []
        for i, target in enumerate(targets):
            end = len(rows[i * len(rows) // len(targets)])
            first = end - len(target)
            if first < 1:
                raise InputError(f"--max-length {self.max_length} leaves no room for the prompt.")
            spare = widest - len(target)
            places.append(list(range(first, end)) + [end - 1] * spare)
            tokens.append(target + [0] * spare)
            weights.append([1.0 / len(target)] * len(target) + [0.0] * spare)
        batch["places"] = torch.tensor(places, device=self.device)
        batch["targets"] = torch.tensor(tokens, device=self.device)
        batch["weights"] = torch.tensor(weights, device=self.device)
        batch["labels"] = self._labels(examples)
        return batch

    def scores(self, batch: Batch) -> torch.Tensor:
        """Length-normalised log-probabilities."""
        width = batch["input_ids"].shape[1]
        first = int(batch["places"].min())
        extra = {"logits_to_keep": width - first} if self._can_trim else {}
        logits = self.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **extra
        ).logits
        places = batch["places"] - (width - logits.shape[1])
        rows = torch.arange(len(places), device=self.device) * len(logits) // len(places)
        logs = logits[rows[:, None], places].float().log_softmax(-1)
        chosen = logs.gather(-1, batch["targets"][..., None])[..., 0]
        return (chosen * batch["weights"]).sum(-1).view(len(batch["labels"]), -1)


class MaskedScorer(Scorer):
    """The logits of the label words at the blank."""

    def _prepare(self) -> None:
        if self.tokenizer.mask_token is None:
            raise InputError("The tokenizer of this masked LM has no mask token to prompt with.")
        self._words = []
        for word in self.task.words:
            ids = self.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
            if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
                pieces = self.tokenizer.convert_ids_to_tokens(ids)
                raise InputError(
                    f"The label word '{word}' must be one known token of this masked LM; its "
                    f"tokenizer makes of it: {' '.join(pieces)}."
                )
            self._words.append(ids[0])

    def collate(self, examples: Sequence[Example]) -> Batch:
        """One row an example, with one blank."""
        blank = self.tokenizer.mask_token
        # A sentence that holds the mask token itself would have two blanks; the last one counts.
        batch = self._pad(self._encode([self.task.cloze(e.sentence, blank) for e in examples]))
        found = batch["input_ids"] == self.tokenizer.mask_token_id
        if not bool(found.any(1).all()):
            raise InputError(f"--max-length {self.max_length} leaves no room for the prompt.")
        order = torch.arange(found.shape[1], device=self.device)
        batch["places"] = (found * order).argmax(1)
        batch["labels"] = self._labels(examples)
        return batch

    def scores(self, batch: Batch) -> torch.Tensor:
        """The label words' logits."""
        logits = self.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
        rows = torch.arange(len(logits), device=self.device)
        return logits[rows, batch["places"]][:, self._words].float()


class EncoderScorer(Scorer):
    """The cosine, times 20, between a sentence's mean embedding and each label sentence's.

    The label sentences ride in the same batch, so that they are encoded with the weights that
    the sentences are encoded with, and cost no further forward.
    """

    def collate(self, examples: Sequence[Example]) -> Batch:
        """One row an example, then one a label."""
        texts = [e.sentence.strip() for e in examples] + self.task.label_sentences()
        rows: list[list[int]] = self.tokenizer(
            texts, truncation=True, max_length=self.max_length, verbose=False
        )["input_ids"]
        batch = self._pad(rows)
        batch["labels"] = self._labels(examples)
        return batch

    def scores(self, batch: Batch) -> torch.Tensor:
        """Scaled cosines."""
        mask = batch["attention_mask"]
        states = self.model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        seen = mask[..., None].to(states.dtype)
        means = (states * seen).sum(1).float() / mask.sum(1, keepdim=True)
        means = F.normalize(means, dim=-1)
        count = len(batch["labels"])
        return _SCALE * means[:count] @ means[count:].T


SCORERS: dict[str, type[Scorer]] = {
    "causal": CausalScorer,
    "masked": MaskedScorer,
    "encoder": EncoderScorer,
}


def _common_prefix(rows: list[list[int]]) -> int:
    shared = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    return shared
