"""Rows of a prompt and its completion, or of a conversation's messages: data without a task.

The forms are those of TRL: ``{"prompt": text, "completion": text}``, the same with lists of
messages, and ``{"messages": [{"role": ..., "content": ...}, ...]}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zokernels.lab.errors import InputError, cut, shown
from zokernels.lab.tasks.metric import LOSS
from zokernels.lab.tasks.task import Example, Prompts, Row, Task

_ROLES = ("system", "user", "assistant", "tool", "developer")
_NO_ANSWER = [{"role": "assistant", "content": ""}]
Turns = tuple[tuple[str, str], ...]


class Completions(Task):
    """The task of such rows: what follows the prompt is learned, its end included."""

    def _examples(self, row: Row, where: str) -> list[Example]:
        """The example of a pair, or one for each answer of the assistant in a conversation."""
        if "messages" not in row:
            return [self._pair(row, where)]
        turns = _turns(row["messages"], "messages", where)
        if self.asked:
            return [_example("", "", turns)]
        answers = [i for i, (role, _) in enumerate(turns) if role == "assistant" and i]
        if not answers:
            raise InputError(
                f"{where}: no message of the assistant follows another, so there is nothing to "
                "learn; give one or remove the row."
            )
        return [_example("", turns[i][1], turns[:i]) for i in answers]

    def _check(self, example: Example, where: str) -> None:
        if not (self.asked or example.answers[0].strip()):
            raise InputError(f"{where}: the completion is empty; give it words or remove the row.")
        texts = [example.sentence, *example.answers, *(text for _, text in example.turns)]
        # Half of a surrogate pair, which JSON can hold and no tokenizer takes.
        "".join(texts).encode()

    def _pair(self, row: Row, where: str) -> Example:
        if self.asked:
            row = {**row, "completion": "" if isinstance(row.get("prompt"), str) else _NO_ANSWER}
        for name in self.fields:
            if name not in row:
                raise InputError(
                    f"{where}: a row must have prompt and completion, or messages; it has "
                    f"{cut(', '.join(map(str, row)))}. --columns prompt=NAME,completion=NAME tells "
                    "of other names."
                )
            if row[name] is None:
                raise InputError(
                    f"{where}: the {name} is null; give it a text or messages, or remove the row."
                )
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list):
            turns = _turns(prompt, "prompt", where)
            answer = _turns(completion, "completion", where)
            if not turns or [role for role, _ in answer] != ["assistant"]:
                raise InputError(
                    f"{where}: a prompt of messages must have one, and its completion must be one "
                    f"message of the assistant; got {shown(completion)}."
                )
            return _example("", answer[0][1], turns)
        for name in self.fields:
            if not isinstance(row[name], str):
                raise InputError(
                    f"{where}: the {name} must be a text, got {shown(row[name])}; put it in quotes "
                    "or remove the row."
                )
        return _example(prompt, completion, ())

    def prompt(self, example: Example) -> str:
        """The prompt as it is, blanks and all."""
        return example.sentence if not example.turns else example.turns[-1][1]

    def candidates(self, example: Example) -> list[str]:
        """The completion as it is."""
        return list(example.answers[:1])


def _example(prompt: str, completion: str, turns: Turns) -> Example:
    sentence = prompt or (turns[-1][1] if turns else "")
    return Example(sentence, 0, {}, (completion,), turns)


def _turns(given: Any, name: str, where: str) -> Turns:
    """A conversation's turns."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise InputError(f"{where}: {name} must be a list of messages, got {shown(given)}.")
    found = []
    for message in given:
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role not in _ROLES or not isinstance(content, str):
            raise InputError(
                f"{where}: a message must have a role ({', '.join(_ROLES)}) and a content that is "
                f"a text, got {shown(message)}."
            )
        found.append((role, content))
    return tuple(found)


COMPLETION = Completions(
    name="completion",
    fields=("prompt", "completion"),
    prompts=Prompts(text="{prompt}", plain="{prompt}", joint=""),
    answers=lambda row: [row["completion"]],
    ends=True,
    measured=LOSS,
)
