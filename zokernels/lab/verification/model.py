"""The small models that whole runs are made with, the same on every machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from zokernels import noise

_VOCABULARY, _WIDTH, _LENGTH, _ROWS = 29, 24, 11, 3

Loss = Callable[[], torch.Tensor]


class Block(nn.Module):
    """Attention with one head, and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)])
        self.qkv, self.out = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH, False)
        self.up = nn.Linear(_WIDTH, 2 * _WIDTH, False)
        self.down = nn.Linear(2 * _WIDTH, _WIDTH, False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (rows, length, width), as it came."""
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, -1)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.transpose(1, 2) / _WIDTH**0.5).masked_fill(later, -1e4)
        x = x + self.out(scores.softmax(-1) @ v)
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))


class Decoder(nn.Module):
    """Two blocks between an embedding and a head that shares its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, _WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, _VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of every next token."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def names() -> dict[str, str | None]:
    """The models, each with the reason if it can't be built."""
    missing = importlib.util.find_spec("transformers") is None
    reason = "transformers is not installed; pip install 'zokernels[hf]'." if missing else None
    return {"module": None, "opt": reason}


def build(name: str, dtype: str, device: str) -> tuple[nn.Module, Loss]:
    """A model with fixed weights, and its loss on a fixed batch."""
    model = Decoder() if name == "module" else _opt()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            z = 0.2 * noise.gaussian(p.numel(), seed=5, stream=i)
            p.copy_((z if p.dim() > 1 else 1 + z).view_as(p))
    model.to(device=device, dtype=getattr(torch, dtype)).eval()
    numbers = noise.uniform16(_ROWS * _LENGTH, noise.MASK, 6, 0, 0, "cpu") % (_VOCABULARY - 3) + 3
    ids = numbers.view(_ROWS, _LENGTH).to(device)

    def loss() -> torch.Tensor:
        found = model(ids)
        logits = found if isinstance(found, torch.Tensor) else found.logits
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return functional.cross_entropy(wide[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    return model, loss


def _opt() -> Any:
    import transformers

    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=_VOCABULARY, hidden_size=_WIDTH, word_embed_proj_dim=_WIDTH,
            num_hidden_layers=2, num_attention_heads=2, ffn_dim=2 * _WIDTH,
            max_position_embeddings=_LENGTH, dropout=0.0,
        )
    )  # fmt: skip
