"""The part of a forward that a perturbation can't change, run once and then returned from memory.

What a block's parameters change comes after their first use. So the layers that are done before it
are not run again: their outputs, kept from an earlier forward at the same weights, are returned in
their place, and the model's own code goes on from there, with its masks, caches and head. A sweep
over n layers with two forwards each then runs about n² layers instead of 2n².
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from zokernels.backends import shards
from zokernels.perturb.layers import layers_of
from zokernels.perturb.modes import is_compiled

Loss = TypeVar("Loss")


class Prefix:
    """Keeps the outputs of a model's layers over the forwards of one step.

    A layer's call is known by its number in the forward, so one that runs several times is several.
    Memory: one output a layer.

    Args:
        model: The module, where there is one.
        compiled: Whether something compiled enters it, though it is not compiled itself.

    Attributes:
        outputs: What the first calls of a forward return at the weights as they now are.
        off: Why every forward runs whole, or None.
    """

    def __init__(self, model: nn.Module | None, compiled: bool = False):
        self.model = model
        self.layers = layers_of(model) if model is not None else []
        self.outputs: list[object] = []
        self.off: str | None = None
        self._checked = self._has_cache = False
        # Calls that were done when a module was entered first; None until a forward was traced.
        self._done_before: dict[nn.Module, int] | None = None
        self._holders: dict[int, list[nn.Module]] = {}
        self._parents: dict[nn.Module, nn.Module] = {}
        if model is None:
            self._give_up("only parameters were given; pass the module itself")
        elif shards.of_model(model):
            self._give_up("the weights are cut over processes, which all run each layer together")
        elif compiled or is_compiled(model):
            self._give_up("the model is compiled; pass it before torch.compile")
        elif not self.layers:
            self._give_up("the model has no nn.ModuleList or nn.Sequential of layers")
        else:
            self._parents = {child: m for m in model.modules() for child in m.children()}
            for m in model.modules():
                for p in m._parameters.values():
                    self._holders.setdefault(id(p), []).append(m)

    @contextlib.contextmanager
    def step(self, forward: Callable[[], Any]) -> Iterator[None]:
        """A step on one batch: nothing is known before it, and nothing is kept after it.

        The first step looks whether a forward whose layers are all returned from memory gives the
        same loss, bit for bit.
        """
        try:
            if not self._checked and self.off is None:
                self._check(forward)
            yield
        finally:
            self.outputs = []
            self._done_before = None

    def run(self, forward: Callable[[], Loss], perturbed: Sequence[nn.Parameter]) -> Loss:
        """``forward()``, with the layers from memory that come before the perturbed parameters."""
        if self.off is not None:
            return forward()
        if self._done_before is None:
            with self._trace():
                limit = 0 if perturbed else None
                with self._layers(limit):
                    return forward()
        with self._layers(self._first_use(perturbed)):
            return forward()

    def forget(self, changed: Sequence[nn.Parameter]) -> None:
        """Drop the outputs that an update of these parameters made wrong."""
        if self.outputs:
            del self.outputs[self._first_use(changed) :]

    def _check(self, forward: Callable[[], Any]) -> None:
        whole = float(self.run(forward, ()))
        # A loss that is not finite equals nothing, and is for the step to refuse.
        if math.isfinite(whole):
            self._checked = True
            if self._has_cache:
                self._give_up(
                    "a forward goes on from a cache, which layers from memory do not fill"
                )
            elif not self.outputs:
                self._give_up("the forward enters none of the model's layers")
            elif not self._repeats(forward, whole):
                self._give_up("the model's layers do more than to return their outputs")

    def _repeats(self, forward: Callable[[], Any], loss: float) -> bool:
        try:
            return float(self.run(forward, ())) == loss
        except Exception:
            # The forward has just worked whole: what it misses is what the layers leave elsewhere,
            # such as the router logits of a mixture of experts.
            return False

    def _give_up(self, why: str) -> None:
        self.off = why
        self.outputs = []
        warnings.warn(
            f"Block-wise forwards run whole, about twice the layers that they need: {why}.",
            stacklevel=5,
        )

    def _first_use(self, params: Sequence[nn.Parameter]) -> int | None:
        """How many calls are done before any of the parameters can matter; None: all of them."""
        assert self._done_before is not None
        first: int | None = None
        for p in params:
            for holder in self._holders.get(id(p), []):
                module: nn.Module | None = holder
                # Weights of a module that is passed by are used by one around it.
                while module is not None and module not in self._done_before:
                    module = self._parents.get(module)
                done = self._done_before[module] if module is not None else 0
                first = done if first is None else min(first, done)
        return first

    @contextlib.contextmanager
    def _trace(self) -> Iterator[None]:
        """Note for every module how many calls were done when it was entered first."""
        assert self.model is not None
        done_before: dict[nn.Module, int] = {}

        def enter(module: nn.Module, _args: object) -> None:
            done_before.setdefault(module, self._done)

        hooks = [m.register_forward_pre_hook(enter) for m in self.model.modules()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._done_before = done_before

    @contextlib.contextmanager
    def _layers(self, limit: int | None) -> Iterator[None]:
        """Inside the block the first ``limit`` calls are returned where known, and else kept."""
        self._done = 0
        self._inside = False
        before = [(layer, vars(layer).get("forward")) for layer in self.layers]
        try:
            for layer in self.layers:
                vars(layer)["forward"] = self._instead_of(layer, limit)
            yield
        finally:
            for layer, own in before:
                if own is None:
                    vars(layer).pop("forward", None)
                else:
                    vars(layer)["forward"] = own

    def _instead_of(self, layer: nn.Module, limit: int | None) -> Callable:
        forward = layer.forward

        def returned_or_run(*args: Any, **kwargs: Any) -> object:
            if self._inside:
                return forward(*args, **kwargs)
            if layer is self.layers[0] and _goes_on_from_a_cache(args, kwargs):
                self._has_cache = True
            call = self._done
            fixed = limit is None or call < limit
            if fixed and call < len(self.outputs):
                self._done += 1
                return _copy(self.outputs[call])
            self._inside = True
            try:
                output = forward(*args, **kwargs)
            finally:
                self._inside = False
            self._done += 1
            if fixed and call == len(self.outputs):
                self.outputs.append(_copy(output))
            return output

        return returned_or_run


def _goes_on_from_a_cache(args: tuple, kwargs: dict[str, Any]) -> bool:
    caches = (x for x in (*args, *kwargs.values()) if hasattr(x, "get_seq_length"))
    # Reformer's says None of its length, and wants every layer to have filled it.
    lengths = [cache.get_seq_length() for cache in caches]
    return any(n is None or int(n) > 0 for n in lengths)


def _copy(output: object) -> object:
    # The model may write into a layer's output: x += residual.
    return tree_map_only(torch.Tensor, torch.Tensor.clone, output)
