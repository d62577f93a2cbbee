"""Answers that a causal model writes, and their F1 over words (Rajpurkar et al., EMNLP 2016)."""

import re
import string
from collections import Counter
from collections.abc import Sequence

import torch

from zokernels.lab.errors import InputError
from zokernels.lab.scoring import CausalScorer, Scorer
from zokernels.lab.tasks.task import Example

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@torch.no_grad()
def answers(scorer: Scorer, examples: Sequence[Example]) -> list[str]:
    """What the model writes greedily after each prompt, up to its end, or that of the line.

    Raises:
        InputError: If the model is no causal LM.
    """
    if not isinstance(scorer, CausalScorer):
        raise InputError(f"Task {scorer.task.name} wants written answers; use a causal LM.")
    tokenizer = scorer.tokenizer
    rows: list[list[int]] = tokenizer([scorer.prompt(e) for e in examples], verbose=False)[
        "input_ids"
    ]
    room = max(1, scorer.max_length - scorer.new_tokens)
    # Padding stands before the text, so that what is written follows it.
    batch = scorer.pad([row[-room:] for row in rows], before=True)
    written = scorer.model.generate(
        **batch,
        max_new_tokens=scorer.new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    read = batch["input_ids"].shape[1]
    texts = tokenizer.batch_decode(written[:, read:], skip_special_tokens=True)
    whole = [text.strip() for text in texts]
    return whole if scorer.task.ends else [text.split("\n")[0] for text in whole]


def exact_match(written: str, right: Sequence[str]) -> float:
    """1 where what was written is a right answer, blanks around them aside, else 0."""
    return float(written.strip() in {answer.strip() for answer in right})


def f1(written: str, right: Sequence[str]) -> float:
    """The best F1 of the words against any right answer, without articles and punctuation."""
    return max(_f1(_words(written), _words(answer)) for answer in right)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted))
