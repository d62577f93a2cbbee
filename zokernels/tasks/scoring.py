"""Scores of the candidates under a model: one class for each kind of model.

A scorer turns examples into a batch of tensors (``collate``) and a batch into a float32 tensor of
scores, one row an example and one column a candidate (``scores``); where examples have unequal
numbers of candidates, the spare places hold −∞. The answer is their argmax, for every kind.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from zokernels.tasks.chat import answer
from zokernels.tasks.errors import InputError
from zokernels.tasks.task import Example, Task

Batch = dict[str, torch.Tensor]
# What training lowers: cross-entropy over the candidates' scores, the loss of the right
# candidate's own tokens, or the share of wrong answers, which has no gradient.
OBJECTIVES = ("candidates", "tokens", "accuracy")
_SCALE = 20.0


class Scorer:
    """What the three kinds share.

    Attributes:
        chat: Turns a causal model's prompt into its chat form, if there is one.

    Args:
        model: A transformers model, perhaps inside an adapter.
        tokenizer: Its tokenizer.
        task: Prompts and label words.
        max_length: Longest row in tokens; a longer one loses the start of its text, so that
            the prompt and the blank stay.
        objective: One of `OBJECTIVES`; None is "tokens" where answers are generated and else
            "candidates".
        demos: Solved examples that stand before every prompt of a causal model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task: Task,
        max_length: int,
        objective: str | None = None,
        demos: Sequence[Example] = (),
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.task = task
        self.max_length = max_length
        self.objective = objective or ("tokens" if task.generates else "candidates")
        self.demos = list(demos)
        self.chat: Callable[[str], str] | None = None
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

    def loss(self, batch: Batch) -> torch.Tensor:
        """What training lowers, a float32 scalar."""
        if self.objective == "tokens":
            return -self.scores(batch).gather(1, batch["labels"][:, None]).mean()
        scores = self.comparisons(batch)
        if self.objective == "accuracy":
            return (scores.argmax(-1) != batch["labels"]).float().mean()
        return F.cross_entropy(scores, batch["labels"])

    def prompt(self, example: Example) -> str:
        """What is read before a candidate: the solved examples, then the example's own prompt."""
        solved = [
            self.task.prompt(e) + self.task.candidates(e)[e.label] + "\n\n" for e in self.demos
        ]
        whole = "".join(solved) + self.task.prompt(example)
        return self.chat(whole) if self.chat else whole

    def predict(self, examples: Sequence[Example], calibrate: bool = False) -> list[int]:
        """The index of each example's best candidate.

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
        return [int(i) for i in scores.argmax(-1)]

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
        pass

    def collate(self, examples: Sequence[Example]) -> Batch:
        """One row a candidate, or one an example where each of its candidates is one token."""
        prompts = [self.prompt(e) for e in examples]
        tails = [self.task.candidates(e) for e in examples]
        heads: list[list[int]] = self.tokenizer(prompts, verbose=False)["input_ids"]
        if self.chat:
            tails = [[answer(p, t) for t in own] for p, own in zip(prompts, tails, strict=True)]
        texts = [p + tail for p, own in zip(prompts, tails, strict=True) for tail in own]
        encoded = iter(self.tokenizer(texts, verbose=False)["input_ids"])
        rows: list[list[int]] = []
        # For each candidate: its row, its tokens, its example, and its place among that's.
        found: list[tuple[int, list[int], int, int]] = []
        for i, head in enumerate(heads):
            options = [next(encoded) for _ in tails[i]]
            common = _common_prefix([head, *options])
            # With nothing before it, a candidate's first token has no probability.
            starts = [max(1, min(common, len(option) - 1)) for option in options]
            together = all(len(o) - s == 1 for o, s in zip(options, starts, strict=True))
            for j, (option, start) in enumerate(zip(options, starts, strict=True)):
                if j == 0 or not together:
                    rows.append(self._cut(option[:-1]))
                found.append((len(rows) - 1, option[start:], i, j))
        batch = self._pad(rows)
        batch.update(self._targets(rows, found))
        batch["labels"] = self._labels(examples)
        return batch

    def _targets(
        self, rows: list[list[int]], found: list[tuple[int, list[int], int, int]]
    ) -> Batch:
        widest = max(len(target) for _, target, _, _ in found)
        places, tokens, weights = [], [], []
        for row, target, _, _ in found:
            end = len(rows[row])
            first = end - len(target)
            if first < 0 or (first == 0 and end == self.max_length):
                raise InputError(f"--max-length {self.max_length} leaves no room for the prompt.")
            spare = widest - len(target)
            places.append(list(range(first, end)) + [end - 1] * spare)
            tokens.append(target + [0] * spare)
            weights.append([1.0 / len(target)] * len(target) + [0.0] * spare)
        owners = [(row, example, place) for row, _, example, place in found]
        return {
            "places": torch.tensor(places, device=self.device),
            "targets": torch.tensor(tokens, device=self.device),
            "weights": torch.tensor(weights, device=self.device),
            "owners": torch.tensor(owners, device=self.device),
        }

    def scores(self, batch: Batch) -> torch.Tensor:
        """Length-normalised log-probabilities."""
        return candidate_scores(self.model, batch)

    def comparisons(self, batch: Batch) -> torch.Tensor:
        """Scores up to a number that an example's candidates share."""
        return candidate_scores(self.model, batch, relative=True)


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
        batch = self._pad([self._cut(row, number) for row in rows])
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
        batch = self._pad(rows)
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


def candidate_scores(model: Any, batch: Batch, relative: bool = False) -> torch.Tensor:
    """The mean log-probability of each candidate's tokens under a causal LM.

    Args:
        model: The model.
        batch: ``input_ids`` and ``attention_mask`` of the rows; for each candidate ``places`` of
            the logits that predict its tokens, ``targets`` and ``weights`` of these, and ``owners``
            (its row, its example, its place among that's); ``labels`` of the examples.
        relative: Only differences between an example's scores matter, so that its candidates may be
            scored by their logits where each is one token at the same place: what a softmax
            divides by is the same for all of them.

    Returns:
        Scores of shape (examples, candidates), float32.
    """
    width = batch["input_ids"].shape[1]
    first = int(batch["places"].min())
    inner = getattr(model, "get_base_model", lambda: model)()
    can_trim = "logits_to_keep" in inspect.signature(inner.forward).parameters
    extra = {"logits_to_keep": width - first} if can_trim else {}
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **extra
    ).logits
    # Counted from the end, where neither trimming nor a soft prompt changes anything.
    places = batch["places"] - (width - logits.shape[1])
    rows, examples, columns = batch["owners"].unbind(1)
    asked = logits[rows[:, None], places]
    one_row_each = len(batch["input_ids"]) == len(batch["labels"])
    if relative and one_row_each and places.shape[1] == 1:
        chosen = asked.gather(-1, batch["targets"][..., None])[..., 0].float()
    else:
        chosen = asked.float().log_softmax(-1).gather(-1, batch["targets"][..., None])[..., 0]
    means = (chosen * batch["weights"]).sum(-1)
    shape = (len(batch["labels"]), int(columns.max()) + 1)
    out = torch.full(shape, float("-inf"), device=means.device)
    return out.index_put((examples, columns), means)


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
