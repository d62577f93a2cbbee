"""What losses take from logits that wait: a cross-entropy, and the logits of a few words."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from zokernels.perturb.logits import WAITING, Hidden, PerturbedLogits


def _gather(logits: PerturbedLogits, dim: int, index: torch.Tensor) -> Any:
    """Logits of a few words: only their rows of the head are made."""
    last = dim in (-1, logits.dim() - 1)
    if not last or index.shape[:-1] != logits.shape[:-1] or index.numel() * 8 > logits.shape[-1]:
        return NotImplemented
    words = logits.parts(index)

    def chosen() -> list[torch.Tensor]:
        rows = logits.entry.filler.rows(logits.weight, words)
        found = []
        for h, w, b, word in zip(logits.hidden, rows, logits.biases(), words, strict=True):
            product = (h[..., None, :].float() * w.float()).sum(-1)
            product = product if b is None else product + b[word].float()
            # A product of 16-bit tensors is rounded to 16 bits.
            found.append(product.to(h.dtype).to(logits.wide))
        return found

    return logits.joined(
        logits.entry.once(("gather",), logits.lane, [*logits.hidden, index], chosen)
    )


def _cross_entropy(
    logits: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """The same loss, from parts of the vocabulary, at the positions that count."""
    plain = weight is None and size_average is None and reduce is None and label_smoothing == 0
    if not plain or not isinstance(logits, PerturbedLogits) or logits.dim() != 2:
        return NotImplemented
    if target.dim() != 1 or target.dtype is not torch.int64 or reduction not in ("mean", "sum"):
        return NotImplemented
    targets = logits.parts(target)

    def losses() -> list[torch.Tensor]:
        kept = [t != ignore_index for t in targets]
        hidden = [h[k] for h, k in zip(logits.hidden, kept, strict=True)]
        wanted = [t[k] for t, k in zip(targets, kept, strict=True)]
        _check_targets(wanted, logits.shape[-1], ignore_index)
        found = _negative_log_likelihoods(logits, hidden, wanted)
        return [getattr(torch, reduction)(x).to(logits.wide) for x in found]

    what = ("cross_entropy", reduction, ignore_index)
    return logits.joined(logits.entry.once(what, logits.lane, [*logits.hidden, target], losses))


def _check_targets(targets: list[torch.Tensor], vocabulary: int, ignore_index: int) -> None:
    for t in targets:
        if len(t) and not 0 <= int(t.min()) <= int(t.max()) < vocabulary:
            raise IndexError(
                f"The labels lie between {int(t.min())} and {int(t.max())}, but the head has "
                f"{vocabulary} rows; use the tokenizer of this model, and {ignore_index} for what "
                "is not to count."
            )


def _negative_log_likelihoods(
    logits: PerturbedLogits, hidden: Hidden, targets: list[torch.Tensor]
) -> list[torch.Tensor]:
    """For each lane log Σ exp(logits) − logit of the target, float32, of shape (rows,)."""
    sums = [torch.full((len(t),), -torch.inf, device=t.device) for t in targets]
    chosen = [torch.zeros(len(t), device=t.device) for t in targets]
    for begin, end, parts in logits.products(hidden):
        for k, part in enumerate(parts):
            part = part.float()
            sums[k] = torch.logaddexp(sums[k], torch.logsumexp(part, 1))
            inside = (targets[k] >= begin) & (targets[k] < end)
            at = (targets[k] - begin).clamp(0, end - begin - 1)
            chosen[k] = torch.where(inside, part.gather(1, at[:, None])[:, 0], chosen[k])
    return [s - c for s, c in zip(sums, chosen, strict=True)]


WAITING.update({torch.Tensor.gather: _gather, F.cross_entropy: _cross_entropy})
