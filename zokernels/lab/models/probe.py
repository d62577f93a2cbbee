"""The linear probe: a new linear layer on a frozen model's last hidden state."""

import json
from pathlib import Path
from typing import Any

import torch

from zokernels.lab.errors import InputError

WEIGHTS, CONFIG = "probe.safetensors", "probe.json"


class Probe(torch.nn.Module):
    """A frozen model and a trainable linear layer from its hidden state to classes, from zero.

    Args:
        model: A transformers model.
        classes: Number of classes.

    Raises:
        InputError: If the task has no classes.
    """

    def __init__(self, model: Any, classes: int) -> None:
        super().__init__()
        if classes < 2:
            raise InputError(
                "--scheme probe needs a task with label words, whose number is that of its "
                "classes; this task's candidates differ by example."
            )
        self.config = model.config
        # Without its head: the logits of the whole vocabulary would only cost time.
        self.body = model.base_model.requires_grad_(False)
        dtype = next(self.body.parameters()).dtype
        width = model.get_input_embeddings().embedding_dim
        self.linear = torch.nn.Linear(getattr(model.config, "hidden_size", width), classes)
        torch.nn.init.zeros_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)
        self.linear.to(dtype=dtype, device=next(self.body.parameters()).device)
        self.eval()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Scores of the classes from the hidden states' mean with the weights given."""
        states = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        features = (states * weights[..., None].to(states.dtype)).sum(1)
        return self.linear(features).float()

    def load_pretrained(self, folder: str | Path) -> None:
        """Takes the linear layer that `save_pretrained` wrote.

        Raises:
            InputError: If it is not there, or of another shape.
        """
        from safetensors.torch import load_file

        try:
            self.linear.load_state_dict(load_file(Path(folder) / WEIGHTS))
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"The probe in {folder} could not be loaded: {reason}") from None

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the linear layer, and the name of the model it belongs to."""
        from safetensors.torch import save_file

        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        save_file({n: p.contiguous() for n, p in self.linear.state_dict().items()}, place / WEIGHTS)
        named = {"model": self.config._name_or_path, "classes": self.linear.out_features}
        (place / CONFIG).write_text(json.dumps(named) + "\n", encoding="utf-8")
