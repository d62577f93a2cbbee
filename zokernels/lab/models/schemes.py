"""What is trained: everything, an adapter, the head, or the parameters that a pattern names."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from zokernels.lab.errors import InputError
from zokernels.lab.models import families, quantised, soft
from zokernels.lab.models.probe import Probe

# Names of biases and of normalisation layers in every family that transformers holds.
_BITFIT = r"bias$|norm|\.ln_"
# Whose weights peft keeps in float32, whatever the model's are.
ADAPTERS = ("lora", "prefix", "prompt")


@dataclass(frozen=True)
class Lora:
    """The shape of an adapter of low rank (Hu et al., ICLR 2022).

    Attributes:
        rank: Of each layer's update.
        alpha: The update is scaled by alpha / rank.
        targets: The layers: names that theirs end with, "all-linear", or a regular expression that
            a whole name matches; None: the projections to queries and values.
        dropout: Before the adapter, in training by backpropagation.
    """

    rank: int = 8
    alpha: float = 16
    targets: str | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class Trained:
    """How many weights a scheme trains, and of how many."""

    weights: int
    of: int


def apply(
    model: Any,
    scheme: str = "full",
    train_only: str | None = None,
    seed: int = 0,
    classes: int = 0,
    lora: Lora = Lora(),  # noqa: B008 (frozen)
) -> tuple[Any, Trained]:
    """Freezes what the scheme does not train.

    Args:
        model: A transformers model, changed in place.
        scheme: One of `SCHEMES`.
        train_only: Regular expression; of what the scheme trains, only parameters whose names
            it matches somewhere stay trainable.
        seed: Fixes an adapter's starting values; the global generator is left as it was.
        classes: Number of label words, for "probe".
        lora: For "lora".

    Returns:
        The model to train, which an adapter or a probe wraps, and the counts.

    Raises:
        InputError: If the scheme is unknown or does not fit the model, or nothing is left to
            train.
    """
    if scheme not in SCHEMES:
        raise InputError(f"--scheme must be one of {', '.join(SCHEMES)}, got '{scheme}'.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if scheme == "probe":
            model = Probe(model, classes)
        elif scheme == "lora":
            model = _lora(model, lora)
        else:
            model = _SCHEMES[scheme](model)
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
        names = [name for name, _ in model.named_parameters()]
        raise InputError(
            f"--train-only '{train_only}' matches none of the parameters that the scheme "
            f"'{scheme}' trains; their names look like {names[len(names) // 2]}."
        )
    whole = sum(quantised.count(p) for p in model.parameters())
    return model, Trained(sum(p.numel() for p in trained), whole)


def _keep(model: torch.nn.Module, pattern: re.Pattern[str]) -> None:
    for name, parameter in model.named_parameters():
        if not pattern.search(name):
            parameter.requires_grad_(False)


def _bitfit(model: Any) -> Any:
    _keep(model, re.compile(_BITFIT, re.IGNORECASE))
    return model


def _lora(model: Any, lora: Lora) -> Any:
    peft = soft.import_peft("lora")
    known = model.config.model_type in families.FAMILIES
    # For a family that the table lacks, peft has defaults of its own.
    targets: Any = families.of(model).queries_and_values if known else None
    if lora.targets is not None:
        # peft takes a list as ends of names, and a text as a regular expression or all-linear.
        plain = re.fullmatch(r"[\w.,\s]+", lora.targets) is not None
        targets = [t.strip() for t in lora.targets.split(",")] if plain else lora.targets
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        # GPT-2 keeps its projections transposed.
        fan_in_fan_out=model.config.model_type == "gpt2",
    )
    try:
        return peft.get_peft_model(model, config).eval()
    except (ValueError, re.error) as error:
        asked = "" if lora.targets is None else f" at --lora-targets '{lora.targets}'"
        raise InputError(f"peft cannot place LoRA in this model{asked}: {error}") from None


def _head(model: Any) -> Any:
    """The output layer alone, with weights of its own where it shares them with the embedding."""
    name = families.of(model).head
    outer = model.get_output_embeddings()
    if outer is None or not hasattr(model, name):
        raise InputError(
            "--scheme head trains the output layer of a language model, and this model has none; "
            "use probe, which adds one."
        )
    if outer.weight is model.get_input_embeddings().weight:
        outer.weight = torch.nn.Parameter(outer.weight.detach().clone())
        if outer.bias is not None:
            # The masked models hold it twice; of an untied pair only this one is used and saved.
            outer.bias.requires_grad_(False)
            outer.bias = torch.nn.Parameter(outer.bias.detach().clone())
        model.config.tie_word_embeddings = False
    _keep(model, re.compile(rf"^{re.escape(name)}\."))
    return model


_SCHEMES: dict[str, Callable[[Any], Any]] = {
    "full": lambda model: model,
    "bitfit": _bitfit,
    "prefix": soft.prefix,
    "prompt": soft.prompt,
    "head": _head,
}
SCHEMES = ("full", "lora", *(s for s in _SCHEMES if s != "full"), "probe")
