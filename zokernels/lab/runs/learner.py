"""The model as a run trains it: loaded, on its device, with what the scheme freezes frozen."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zokernels.lab.errors import InputError
from zokernels.lab.models import loading, schemes, sharding
from zokernels.lab.runs.settings import Settings


@dataclass(frozen=True)
class Learner:
    """A model in training, and what belongs to it.

    Attributes:
        model: The model, which an adapter or a probe may wrap.
        loaded: What it was made of: tokenizer, kind and notes.
        trained: How much of it the run changes.
    """

    model: Any
    loaded: loading.Loaded
    trained: schemes.Trained

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that the run changes, by their names."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def copy(self) -> list[torch.Tensor]:
        """Their values now."""
        return [p.detach().clone() for p in self.parameters().values()]

    @torch.no_grad()
    def put(self, values: list[torch.Tensor]) -> None:
        """Gives them the values of a copy."""
        for parameter, value in zip(self.parameters().values(), values, strict=True):
            parameter.copy_(value)

    def save(self, path: Path, weights: dict[str, Any] | None = None) -> None:
        """Writes the model, or its adapter, and the tokenizer into a folder.

        Args:
            path: The folder.
            weights: The whole weights of a model that is cut over processes.
        """
        more = {} if weights is None else {"state_dict": weights}
        with warnings.catch_warnings():
            # peft looks beside the base for the size of its vocabulary, which a file in GGUF form
            # has inside; no scheme changes it.
            warnings.filterwarnings("ignore", "Could not find a config file")
            self.model.save_pretrained(path, **more)
        self.loaded.tokenizer.save_pretrained(path)


def load(s: Settings, shard: bool = False) -> Learner:
    """The model as every run of these settings begins with it.

    Args:
        s: The settings.
        shard: Cut it over the processes there are.

    Raises:
        InputError: If it cannot be had, or the device or the scheme do not fit it.
    """
    # Tensors that a checkpoint lacks start random, and must start the same on a resume.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(s.seed)
        loaded = loading.load(s.model, s.dtype, s.load_in, s.device)
    try:
        # What is cut is moved a part at a time.
        model = loaded.model if s.load_in or shard else loaded.model.to(s.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {s.device} cannot hold the model: {reason}") from None
    classes = len(s.the_task().words)
    lora = schemes.Lora(s.lora_rank, s.lora_alpha, s.lora_targets, s.lora_dropout)
    model, trained = schemes.apply(model, s.scheme, s.train_only, s.seed, classes, lora)
    return Learner(sharding.shard(model) if shard else model, loaded, trained)
