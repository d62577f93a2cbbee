"""What is trained: everything, LoRA adapters, or the parameters that a pattern names."""

import re
from dataclasses import dataclass
from typing import Any

import torch

from zokernels.tasks.errors import InputError

SCHEMES = ("full", "lora", "bitfit")

# Names of biases and of normalisation layers in every family that transformers holds.
_BITFIT = r"bias$|norm|\.ln_"
_LORA_RANK, _LORA_ALPHA = 8, 16


@dataclass(frozen=True)
class Trained:
    """What a scheme trains: tensors and weights, and of how many weights."""

    tensors: int
    weights: int
    of: int


def apply(
    model: Any, scheme: str = "full", train_only: str | None = None, seed: int = 0
) -> tuple[Any, Trained]:
    """Freezes what the scheme does not train.

    Args:
        model: A transformers model, changed in place.
        scheme: "full", "lora" (rank 8, α 16, on the query and value projections) or "bitfit"
            (biases and normalisation layers).
        train_only: Regular expression; of what the scheme trains, only parameters whose names
            it matches somewhere stay trainable.
        seed: Fixes LoRA's starting values; the global generator is left as it was.

    Returns:
        The model to train, which LoRA wraps, and the counts.

    Raises:
        InputError: If the scheme is unknown, or nothing is left to train.
    """
    if scheme not in SCHEMES:
        raise InputError(f"--scheme must be one of {', '.join(SCHEMES)}, got '{scheme}'.")
    if scheme == "lora":
        model = _lora(model, seed)
    elif scheme == "bitfit":
        _keep(model, re.compile(_BITFIT, re.IGNORECASE))
    if train_only is not None:
        try:
            pattern = re.compile(train_only)
        except re.error as error:
            raise InputError(
                f"--train-only '{train_only}' is not a regular expression: {error}."
            ) from None
        _keep(model, pattern)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise InputError(
            f"--train-only '{train_only}' matches none of the parameters that the scheme "
            f"'{scheme}' trains; their names look like {_sample_name(model)}."
        )
    count = sum(p.numel() for p in trained)
    return model, Trained(len(trained), count, sum(p.numel() for p in model.parameters()))


def _keep(model: torch.nn.Module, pattern: re.Pattern[str]) -> None:
    for name, parameter in model.named_parameters():
        if not pattern.search(name):
            parameter.requires_grad_(False)


def _sample_name(model: torch.nn.Module) -> str:
    names = [name for name, _ in model.named_parameters()]
    return names[len(names) // 2]


def _lora(model: Any, seed: int) -> Any:
    try:
        import peft
    except ImportError:
        raise InputError(
            "The scheme 'lora' needs peft, which is not installed: pip install 'zokernels[hf]'."
        ) from None
    config = peft.LoraConfig(r=_LORA_RANK, lora_alpha=_LORA_ALPHA, lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return peft.get_peft_model(model, config).eval()
        except ValueError as error:
            raise InputError(f"peft cannot place LoRA in this model: {error}") from None
