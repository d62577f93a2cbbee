"""What the scorers of all kinds of models share.

A scorer turns examples into a batch of tensors (``collate``) and a batch into a float32 tensor of
scores, one row an example and one column a candidate (``scores``); where examples have unequal
numbers of candidates, the spare places hold −∞. The answer is their argmax, for every kind.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from zokernels.lab.errors import InputError
from zokernels.lab.tasks.chat import USER, Form, Turn
from zokernels.lab.tasks.task import Example, Task

Batch = dict[str, torch.Tensor]
# What training lowers: cross-entropy over the candidates' scores, the loss of the right
# candidate's own tokens, or the share of wrong answers, which has no gradient.
OBJECTIVES = ("candidates", "tokens", "accuracy")
# Of an answer that is written: enough for the published tasks'.
NEW_TOKENS = 32


class Scorer:
    """What the three kinds share.

    Attributes:
        chat: The form in which a causal model reads a conversation, if that is what it gets.

    Args:
        model: A transformers model, perhaps inside an adapter.
        tokenizer: Its tokenizer.
        task: Prompts and label words.
        max_length: Longest row in tokens; a longer one loses the start of its text, so that
            the prompt and the blank stay.
        objective: One of `OBJECTIVES`; None is "tokens" where answers are generated and else
            "candidates".
        demos: Solved examples that stand before every prompt of a causal model.
        new_tokens: The most that are written as an answer.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task: Task,
        max_length: int,
        objective: str | None = None,
        demos: Sequence[Example] = (),
        new_tokens: int = NEW_TOKENS,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.task = task
        self.max_length = max_length
        self.objective = objective or ("tokens" if task.generates else "candidates")
        self.demos = list(demos)
        self.new_tokens = new_tokens
        self.chat: Form | None = None
        self.device = next(model.parameters()).device
        self._prepare()

    def _prepare(self) -> None:
        """Work that is done once, and refusals."""
        if self.demos or self.objective == "tokens":
            what = "Examples in context need" if self.demos else "--objective tokens needs"
            raise InputError(f"{what} a causal LM, but this model is none.")
        if not self.task.words:
            self.task.label_sentences()

    def collate(self, examples: Sequence[Example]) -> Batch:
        """The tensors of a batch."""
        raise NotImplementedError

    def scores(self, batch: Batch) -> torch.Tensor:
        """Scores of shape (examples, candidates), float32."""
        raise NotImplementedError

    def comparisons(self, batch: Batch) -> torch.Tensor:
        """Scores of which only the differences between an example's candidates matter."""
        return self.scores(batch)

    def losses(self, batch: Batch) -> torch.Tensor:
        """What training lowers the mean of, one float32 number an example."""
        if self.objective == "tokens":
            return -self.scores(batch).gather(1, batch["labels"][:, None])[:, 0]
        scores = self.comparisons(batch)
        if self.objective == "accuracy":
            return (scores.argmax(-1) != batch["labels"]).float()
        return F.cross_entropy(scores, batch["labels"], reduction="none")

    def loss(self, batch: Batch) -> torch.Tensor:
        """What training lowers, a float32 scalar."""
        return self.losses(batch).mean()

    def prompt(self, example: Example) -> str:
        """What is read before a candidate: the solved examples, then the example's own prompt."""
        return self.chat.prompt(self._turns(example)) if self.chat else self._whole(example)

    def _whole(self, example: Example) -> str:
        solved = [
            self.task.prompt(e) + self.task.candidates(e)[e.label] + "\n\n" for e in self.demos
        ]
        return "".join(solved) + self.task.prompt(example)

    def _turns(self, example: Example) -> Sequence[Turn]:
        """A conversation of its own, or the prompt as a turn of the user."""
        return example.turns or [(USER, self._whole(example))]

    def candidates(self, example: Example, prompt: str) -> list[str]:
        """What may follow a prompt: the example's candidates as the model writes them."""
        found, ends = self.task.candidates(example), self.task.ends
        if self.chat is not None:
            turns = self._turns(example)
            return [self.chat.answer(turns, prompt, text, ends) for text in found]
        end = (self.tokenizer.eos_token or "") if ends else ""
        return [text + end for text in found]

    def predict(self, examples: Sequence[Example], calibrate: bool = False) -> list[int]:
        """The index of each example's best candidate.

        Args:
            examples: At least one.
            calibrate: As of `judged`.
        """
        return [int(i) for i in self.judged(examples, calibrate).argmax(-1)]

    def judged(self, examples: Sequence[Example], calibrate: bool = False) -> torch.Tensor:
        """What the candidates are chosen by: their scores, of shape (examples, candidates).

        Args:
            examples: At least one.
            calibrate: Judge by how much a score exceeds that of the same candidate after the
                prompt with its texts emptied.
        """
        scores = self.scores(self.collate(examples))
        if calibrate:
            free = [self.task.content_free(e) for e in examples]
            # Candidates of the task's own are the same for all, so that one row is enough.
            base = self.scores(self.collate(free[:1] if self.task.words else free))
            scores = scores - torch.where(base.isinf(), 0.0, base)
        return scores

    def _cut(self, row: list[int], keep: int | None = None) -> list[int]:
        """The row at ``max_length``: without its start, or without its end if that has ``keep``."""
        over = len(row) - self.max_length
        if over <= 0:
            return row
        special = self.tokenizer.all_special_ids
        lead = 1 if row[0] in special else 0
        if keep is not None and keep in row[: lead + over]:
            tail = 1 if row[-1] in special else 0
            return row[: len(row) - over - tail] + row[len(row) - tail :]
        return row[:lead] + row[lead + over :]

    def pad(self, rows: list[list[int]], before: bool = False) -> Batch:
        """The rows at the width of the longest; padding stands behind them, or ``before`` them."""
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id, dtype=torch.long)
        seen = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            start = width - len(row) if before else 0
            ids[i, start : start + len(row)] = torch.tensor(row)
            seen[i, start : start + len(row)] = 1
        return {"input_ids": ids.to(self.device), "attention_mask": seen.to(self.device)}

    def _labels(self, examples: Sequence[Example]) -> torch.Tensor:
        return torch.tensor([e.label for e in examples], device=self.device)
