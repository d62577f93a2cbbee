"""The chat form of a prompt: as a turn of the user, after which the assistant's answer begins.

A tokenizer's own template is taken where it has one. Models older than such templates are in a
table here, by a word in their names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zokernels.lab.errors import InputError

# Vicuna 1.1 to 1.5: the form that the model was trained on, as its makers publish it.
FORMS = {
    "vicuna": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. "
        "USER: {prompt} ASSISTANT:"
    ),
}


def form(tokenizer: Any, model: str, kind: str) -> Callable[[str], str]:
    """The function from a prompt to its chat form.

    Args:
        tokenizer: The model's tokenizer.
        model: The model's name or folder.
        kind: "causal", "masked" or "encoder".

    Raises:
        InputError: If the model is no causal LM, or neither it nor the table has a form.
    """
    if kind != "causal":
        raise InputError("--chat needs a causal LM, but this model is none.")
    if getattr(tokenizer, "chat_template", None):
        return lambda prompt: _by_template(tokenizer, prompt)
    for word, text in FORMS.items():
        if word in model.lower():
            return lambda prompt: text.replace("{prompt}", prompt)
    raise InputError(
        f"--chat: the tokenizer of {model} has no chat template, and its name has none of "
        f"{', '.join(FORMS)}; leave --chat out, or add its form in chat.py."
    )


def answer(prompt: str, candidate: str) -> str:
    """A candidate after a prompt: a template that ends a line wants no blank before the answer."""
    return candidate.lstrip(" ") if prompt[-1:].isspace() else candidate


def _by_template(tokenizer: Any, prompt: str) -> str:
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    # The tokenizer puts it there itself.
    return text.removeprefix(tokenizer.bos_token or "")
