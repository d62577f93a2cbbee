"""Scores of candidates under encoders: with a masked head, or by their embeddings alone."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from zokernels.lab.errors import InputError
from zokernels.lab.scoring.scorer import Batch, Scorer
from zokernels.lab.tasks.task import Example

_SCALE = 20.0


class MaskedScorer(Scorer):
    """The logits of the label words at the blank."""

    def _prepare(self) -> None:
        super()._prepare()
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
        blank, number = self.tokenizer.mask_token, self.tokenizer.mask_token_id
        texts = [self.task.cloze(e, blank) for e in examples]
        rows: list[list[int]] = self.tokenizer(texts, verbose=False)["input_ids"]
        # A text that holds the mask token itself would have two blanks; the last one counts.
        batch = self.pad([self._cut(row, number) for row in rows])
        found = batch["input_ids"] == number
        if not bool(found.any(1).all()):
            raise InputError(f"--max-length {self.max_length} leaves no room for the prompt.")
        order = torch.arange(found.shape[1], device=self.device)
        batch["places"] = (found * order).argmax(1)
        batch["labels"] = self._labels(examples)
        return batch

    def scores(self, batch: Batch) -> torch.Tensor:
        """The label words' logits."""
        ids = batch["input_ids"]
        logits = self.model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
        rows = torch.arange(len(logits), device=self.device)
        # A soft prompt stands before the text.
        places = batch["places"] + (logits.shape[1] - ids.shape[1])
        return logits[rows, places][:, self._words].float()


class EncoderScorer(Scorer):
    """The cosine, times 20, between a text's mean embedding and each label sentence's.

    The label sentences ride in the same batch, so that they are encoded with the weights that
    the texts are encoded with, and cost no further forward.
    """

    def collate(self, examples: Sequence[Example]) -> Batch:
        """One row an example, then one a label."""
        plain = self.task.with_template(False)
        texts = [plain.prompt(e) for e in examples] + self.task.label_sentences()
        rows: list[list[int]] = self.tokenizer(
            texts, truncation=True, max_length=self.max_length, verbose=False
        )["input_ids"]
        batch = self.pad(rows)
        batch["labels"] = self._labels(examples)
        return batch

    def scores(self, batch: Batch) -> torch.Tensor:
        """Scaled cosines."""
        mask = batch["attention_mask"]
        states = self.model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        # A soft prompt stands before the text, and is not part of its meaning.
        states = states[:, -mask.shape[1] :]
        seen = mask[..., None].to(states.dtype)
        means = (states * seen).sum(1).float() / mask.sum(1, keepdim=True)
        means = F.normalize(means, dim=-1)
        count = len(batch["labels"])
        return _SCALE * means[:count] @ means[count:].T
