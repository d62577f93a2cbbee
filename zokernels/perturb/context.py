"""A context in which a model's forwards are perturbed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from zokernels import masks
from zokernels.backends import shards, tracer
from zokernels.perturb.direction import Direction, Move
from zokernels.perturb.in_place import InPlace
from zokernels.perturb.modes import choose_mode
from zokernels.perturb.on_entry import OnEntry


@contextlib.contextmanager
def perturbed(
    model: nn.Module,
    seed: int,
    scale: float,
    *,
    dist: str = "gaussian",
    mask: masks.Mask | None = None,
    perturb: str | None = None,
    backend: str | None = None,
) -> Iterator[nn.Module]:
    """A context in which the model's forwards see θ + scale · z of its trainable parameters.

    Args:
        model: The module; its parameters' streams are their positions in ``named_parameters()``.
        seed: Seed of the direction, 0 … 2⁶⁴ − 1.
        scale: Factor on the direction; negative for the other side.
        dist: ``"gaussian"``, ``"rademacher"`` or ``"rank1"``.
        mask: One of `zokernels.masks`, with one entry a trainable parameter where it is a list.
        perturb: ``"on_entry"`` (the default), or ``"in_place"``. On entry, a parameter that no
            forward uses is not perturbed in this context: it raises at its end; and what
            torch.compile made runs eagerly.
        backend: As for `zokernels.ops.add_noise_`.

    Yields:
        The model. Its weights are what they were when the block ends, also by an exception.
    """
    shards.settle(model)
    chosen = [(i, p) for i, p in enumerate(model.parameters()) if p.requires_grad]
    params = [p for _, p in chosen]
    streams = [i for i, _ in chosen]
    moves = [Move((scale,))] * len(params)
    direction = Direction(params, streams, moves, [seed], dist, mask, backend)
    with torch.no_grad():
        mode = choose_mode(model, perturb)
        if mode == "paired":
            raise ValueError(
                "perturb='paired' was asked for, but this context has one point and nothing to "
                "pair; use None, 'on_entry' or 'in_place'."
            )
        if mode == "in_place":
            torch.clear_autocast_cache()
            with InPlace(params, model=model).at(direction):
                yield model
            return
        layers = OnEntry(model, params)
        with tracer.eager(), layers.at(direction):
            yield model
        layers.check_perturbed()
