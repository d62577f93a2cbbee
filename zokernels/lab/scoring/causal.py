"""Scores of candidates under a causal model, which reads what they share once.

An example's candidates are branches of one row: after the tokens that they share come the tokens of
each, which see the shared ones and their own, and are numbered as if they followed them at once. So
the scores are those of a row for each candidate, at the cost of one row.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from zokernels.lab.errors import InputError
from zokernels.lab.models import families
from zokernels.lab.scoring.scorer import Batch, Scorer
from zokernels.lab.tasks.task import Example


@dataclass(frozen=True)
class _Row:
    """What the model reads in one piece: the tokens that are shared, then those of each branch."""

    shared: list[int]
    branches: list[list[int]]

    def __len__(self) -> int:
        return len(self.shared) + sum(map(len, self.branches))

    def place(self, branch: int, index: int) -> int:
        """Where the token is that would have this index if the branch were alone."""
        before = sum(map(len, self.branches[:branch])) if index >= len(self.shared) else 0
        return before + index


@dataclass(frozen=True)
class _Candidate:
    """Where a candidate is read, and what is scored of it.

    Attributes:
        row: The row it is read in.
        example: Its example.
        column: Its place among the example's candidates.
        tokens: The tokens that are scored.
        places: Where in the row each of them is predicted.
    """

    row: int
    example: int
    column: int
    tokens: list[int]
    places: list[int]


class CausalScorer(Scorer):
    """The mean log-probability of each candidate's tokens after the prompt.

    Where the model can read branches, an example is one row, and else one row for each candidate of
    more than one token.
    """

    def _prepare(self) -> None:
        self.longest_row = longest_branching_row(self.model)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """The rows, and where in them the candidates' tokens are predicted."""
        rows: list[_Row] = []
        candidates: list[_Candidate] = []
        for i, (options, starts) in enumerate(self._encoded(examples)):
            shared = min(starts)
            # A candidate's last token is predicted, never read.
            tails = [option[shared:-1] for option in options]
            own = [j for j, tail in enumerate(tails) if tail]
            whole = _Row(options[0][:shared], [tails[j] for j in own])
            if len(own) < 2 or len(whole) <= self.longest_row:
                split = [whole]
                where = {j: (0, place) for place, j in enumerate(own)}
            else:
                split = [_Row(whole.shared, [tail]) for tail in whole.branches]
                where = {j: (row, 0) for row, j in enumerate(own)}
            for j, (option, start) in enumerate(zip(options, starts, strict=True)):
                row, branch = where.get(j, (0, 0))
                places = [split[row].place(branch, k - 1) for k in range(start, len(option))]
                candidates.append(_Candidate(len(rows) + row, i, j, option[start:], places))
            rows += split
        batch = self._read(rows)
        batch.update(self._targets(candidates))
        batch["labels"] = self._labels(examples)
        return batch

    def _encoded(self, examples: Sequence[Example]) -> Iterator[tuple[list[list[int]], list[int]]]:
        """Each example's prompts with a candidate, in tokens, and where the candidates start."""
        prompts = [self.prompt(e) for e in examples]
        tails = [self.candidates(e, p) for e, p in zip(examples, prompts, strict=True)]
        heads: list[list[int]] = self.tokenizer(prompts, verbose=False)["input_ids"]
        texts = [p + tail for p, own in zip(prompts, tails, strict=True) for tail in own]
        encoded = iter(self.tokenizer(texts, verbose=False)["input_ids"])
        for head, own in zip(heads, tails, strict=True):
            options = [next(encoded) for _ in own]
            common = len(_shared([head, *options]))
            # With nothing before it, a candidate's first token has no probability.
            starts = [max(1, min(common, len(option) - 1)) for option in options]
            yield self._shortened(options, starts)

    def _shortened(
        self, options: list[list[int]], starts: list[int]
    ) -> tuple[list[list[int]], list[int]]:
        """All candidates without as much of the text's start as the longest can't have."""
        over = max(map(len, options)) - 1 - self.max_length
        if over <= 0:
            return options, starts
        lead = 1 if options[0][0] in self.tokenizer.all_special_ids else 0
        # What is before a candidate has to be more than the special token.
        spare = min(starts) - lead - 1
        if over > spare and self.task.ends:
            # Then a long answer loses its end.
            options, over = [options[0][: len(options[0]) - (over - max(0, spare))]], max(0, spare)
        elif over > spare:
            raise InputError(f"--max-length {self.max_length} leaves no room for the prompt.")
        cut = [option[:lead] + option[lead + over :] for option in options]
        return cut, [start - over for start in starts]

    def _read(self, rows: list[_Row]) -> Batch:
        """What the model reads: plain rows, or with branches a mask and positions of their own."""
        batch = self.pad([sum(row.branches, row.shared) for row in rows])
        if max(len(row.branches) for row in rows) < 2:
            return batch
        seen = batch["attention_mask"]
        branches, positions = torch.zeros_like(seen), torch.zeros_like(seen)
        for i, row in enumerate(rows):
            end = len(row.shared)
            positions[i, :end] = torch.arange(end)
            for number, branch in enumerate(row.branches, start=1):
                begin, end = end, end + len(branch)
                branches[i, begin:end] = number
                positions[i, begin:end] = len(row.shared) + torch.arange(len(branch))
        order = torch.arange(seen.shape[1], device=self.device)
        visible = (order[:, None] >= order) & (seen[:, None] == 1)
        visible &= (branches[:, None] == 0) | (branches[:, None] == branches[..., None])
        dtype = self.model.get_input_embeddings().weight.dtype
        mask = torch.zeros(visible.shape, dtype=dtype, device=self.device)
        mask.masked_fill_(~visible, torch.finfo(dtype).min)
        batch["attention_mask"], batch["position_ids"] = mask[:, None], positions
        return batch

    def _targets(self, candidates: list[_Candidate]) -> Batch:
        widest = max(len(c.tokens) for c in candidates)
        places, tokens, weights = [], [], []
        for c in candidates:
            spare = widest - len(c.tokens)
            places.append(c.places + c.places[-1:] * spare)
            tokens.append(c.tokens + [0] * spare)
            weights.append([1.0 / len(c.tokens)] * len(c.tokens) + [0.0] * spare)
        spots = {(c.example, c.row, c.places[0]) for c in candidates}
        alone = widest == 1 and len(spots) == candidates[-1].example + 1
        return {
            "places": torch.tensor(places, device=self.device),
            "targets": torch.tensor(tokens, device=self.device),
            "weights": torch.tensor(weights, device=self.device),
            "owners": torch.tensor(
                [(c.row, c.example, c.column) for c in candidates], device=self.device
            ),
            "one_place": torch.tensor(alone),
        }

    def scores(self, batch: Batch) -> torch.Tensor:
        """Length-normalised log-probabilities."""
        return candidate_scores(self.model, batch)

    def comparisons(self, batch: Batch) -> torch.Tensor:
        """Scores up to a number that an example's candidates share."""
        return candidate_scores(self.model, batch, relative=True)


def candidate_scores(model: Any, batch: Batch, relative: bool = False) -> torch.Tensor:
    """The mean log-probability of each candidate's tokens under a causal LM.

    Args:
        model: The model.
        batch: ``input_ids`` and ``attention_mask`` of the rows, and ``position_ids`` where they
            have branches; for each candidate ``places`` of the logits that predict its tokens,
            ``targets`` and ``weights`` of these, and ``owners`` (its row, its example, its place
            among that's); ``one_place``, whether all of an example's candidates are one token at
            one place; ``labels`` of the examples.
        relative: Only differences between an example's scores matter, so that its candidates may be
            scored by their logits where they have one place: what a softmax divides by is the
            same for all of them.

    Returns:
        Scores of shape (examples, candidates), float32.
    """
    width = batch["input_ids"].shape[1]
    extra: dict[str, Any] = {}
    if "position_ids" in batch:
        extra["position_ids"] = batch["position_ids"]
    known = _arguments(model)
    # Every layer's keys and values, which only generation needs; a prefix comes as such.
    if "use_cache" in known and not _has_soft_prompt(model):
        extra["use_cache"] = False
    rows, examples, columns = batch["owners"].unbind(1)
    spots = torch.stack([rows[:, None].expand_as(batch["places"]), batch["places"]], -1)
    unique, asked_for = spots.flatten(0, 1).unique(dim=0, return_inverse=True)
    with _head_only_at(model, unique, width):
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **extra
        ).logits
    asked_for = asked_for.view(batch["places"].shape)
    asked = logits[torch.zeros_like(asked_for), asked_for]
    if relative and bool(batch["one_place"]):
        chosen = asked.gather(-1, batch["targets"][..., None])[..., 0].float()
    else:
        chosen = asked.float().log_softmax(-1).gather(-1, batch["targets"][..., None])[..., 0]
    means = (chosen * batch["weights"]).sum(-1)
    shape = (len(batch["labels"]), int(columns.max()) + 1)
    out = torch.full(shape, float("-inf"), device=means.device)
    return out.index_put((examples, columns), means)


@contextlib.contextmanager
def _head_only_at(model: Any, spots: torch.Tensor, width: int) -> Iterator[None]:
    """A model's head gets the hidden states of some places only: logits of shape (1, places, …).

    With a vocabulary of hundreds of thousands its head costs more than all layers.

    Args:
        model: The model.
        spots: Row and place of each, of shape (places, 2).
        width: Of the rows that the places are in.
    """
    rows, places = spots.unbind(1)

    def pick(_head: Any, given: tuple) -> tuple:
        hidden, *rest = given
        # Counted from the end, where a soft prompt changes nothing.
        return (hidden[rows, places - (width - hidden.shape[1])][None], *rest)

    handle = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def longest_branching_row(model: Any) -> int:
    """The most tokens that a row with branches may have under this model; 0 if it can't read them.

    It must be of a family in the table, whose attention takes any mask and whose positions can be
    given; a soft prompt puts tokens before the row that the mask knows nothing of; and a sliding
    window counts the tokens of all branches.
    """
    config = model.config
    if (
        _has_soft_prompt(model)
        or config.model_type not in families.FAMILIES
        or config._attn_implementation not in ("sdpa", "eager")
        or "position_ids" not in _arguments(model)
    ):
        return 0
    limits = [config.max_position_embeddings, getattr(config, "sliding_window", None)]
    return min(limit for limit in limits if limit)


def _has_soft_prompt(model: Any) -> bool:
    adapter = getattr(model, "active_peft_config", None)
    return adapter is not None and adapter.is_prompt_learning


def _arguments(model: Any) -> Any:
    inner = getattr(model, "get_base_model", lambda: model)()
    return inspect.signature(inner.forward).parameters


def _shared(rows: list[list[int]]) -> list[tuple[int, ...]]:
    """The columns before the first in which the rows differ."""
    return list(takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))
