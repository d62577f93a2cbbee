"""The chat form of a prompt: turns, after which the assistant's answer begins.

A tokenizer's own template is taken where it has one. Models older than such templates are in a
table here, by a word in their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zokernels.lab.errors import InputError, cut

Turn = tuple[str, str]
USER, ASSISTANT = "user", "assistant"


@dataclass(frozen=True)
class Written:
    """How a model without a template was trained: what comes first, and each turn by its role."""

    begin: str
    turns: dict[str, str]
    answer: str


# Vicuna 1.1 to 1.5: the form that the model was trained on, as its makers publish it.
FORMS = {
    "vicuna": Written(
        begin=(
            "A chat between a curious user and an artificial intelligence assistant. The assistant "
            "gives helpful, detailed, and polite answers to the user's questions. "
        ),
        turns={USER: "USER: {} ", ASSISTANT: "ASSISTANT: {}</s>", "system": "{} "},
        answer="ASSISTANT:",
    ),
}


class Form:
    """A model's way to write a conversation.

    Args:
        tokenizer: The model's tokenizer.
        written: Its form where the tokenizer has none.
    """

    def __init__(self, tokenizer: Any, written: Written | None = None) -> None:
        self.tokenizer = tokenizer
        self.written = written

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The turns, and the beginning of the assistant's.

        Raises:
            InputError: If the model's template does not take them.
        """
        if self.written is None:
            return self._by_template(turns, True)
        # A system's turn stands in place of the beginning.
        begin = "" if turns[0][0] == "system" else self.written.begin
        return begin + "".join(map(self._turn, turns)) + self.written.answer

    def _turn(self, turn: Turn) -> str:
        assert self.written is not None
        role, content = turn
        if role not in self.written.turns:
            raise InputError(
                f"This model's chat form has no {role}; its turns are of "
                f"{', '.join(self.written.turns)}."
            )
        # Braces of the content stay what they are.
        return self.written.turns[role].replace("{}", content)

    def answer(self, turns: Sequence[Turn], prompt: str, text: str, ends: bool) -> str:
        """What follows a prompt where the assistant's answer is ``text``.

        Args:
            turns: Those of the prompt.
            prompt: What `prompt` made of them.
            text: The answer.
            ends: Whether what the model writes at its end belongs to it.
        """
        if ends and self.written is None:
            whole = self._by_template([*turns, (ASSISTANT, text)], False)
            # Some templates write an earlier answer otherwise than one that they begin.
            if whole.startswith(prompt):
                return whole[len(prompt) :]
        # A template that ends a line wants no blank before the answer.
        begun = text.lstrip(" ") if prompt[-1:].isspace() else text
        if not ends:
            return begun
        blank = "" if self.written is None or begun.startswith(" ") else " "
        return blank + begun + (self.tokenizer.eos_token or "")

    def _by_template(self, turns: Sequence[Turn], begins: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=begins
            )
        except Exception as error:
            # Templates raise errors of their own, such as for roles that do not alternate.
            raise InputError(
                f"The model's chat template does not take the roles "
                f"{cut(', '.join(role for role, _ in turns))}: {cut(str(error))}"
            ) from None
        # The tokenizer puts it there itself.
        return text.removeprefix(self.tokenizer.bos_token or "")


def form(tokenizer: Any, model: str, kind: str, asked_by: str = "--chat") -> Form:
    """A model's form.

    Args:
        tokenizer: The model's tokenizer.
        model: The model's name or folder.
        kind: "causal", "masked" or "encoder".
        asked_by: What wants it, for errors.

    Raises:
        InputError: If the model is no causal LM, or neither it nor the table has a form.
    """
    if kind != "causal":
        raise InputError(f"{asked_by} needs a causal LM, but this model is none.")
    if getattr(tokenizer, "chat_template", None):
        return Form(tokenizer)
    for word, written in FORMS.items():
        if word in model.lower():
            return Form(tokenizer, written)
    raise InputError(
        f"{asked_by}: the tokenizer of {model} has no chat template, and its name has none of "
        f"{', '.join(FORMS)}; take a chat model, or prompts and completions that are texts."
    )
