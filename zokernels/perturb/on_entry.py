"""The perturbed forward that leaves the stored weights alone.

While it runs, a `PerturbedWeight` stands in each module's place for a parameter; what an operation
asks for is made in scratch memory of the size of the largest layer, and thrown away. A module that
keeps its weights elsewhere (an LSTM's flat list) gets them by hooks, filled as it is entered.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from zokernels.perturb import operations  # noqa: F401  (fills the table of operations)
from zokernels.perturb.direction import Direction
from zokernels.perturb.filling import Filler, Lane
from zokernels.perturb.hooks import Hooks
from zokernels.perturb.weight import Entry, PerturbedWeight


class OnEntry:
    """Perturbs each module's parameters in scratch memory while the module runs.

    Args:
        model: The module.
        params: Its parameters that are perturbed.
        lazy_logits: Make a language model's logits only where the loss looks at them.
        keep: Keep the memory of every perturbed weight, at the same addresses.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[nn.Parameter],
        lazy_logits: bool = True,
        keep: bool = False,
    ):
        self.model = model
        self.params = list(params)
        position = {id(p): i for i, p in enumerate(self.params)}
        self._filler = Filler(self.params, keep)
        head = _head_of(model) if lazy_logits else None
        self._entry = Entry(self._filler, position.get(id(head)))
        weights = [PerturbedWeight(p, self._entry, i) for i, p in enumerate(self.params)]
        elsewhere = {m for kept in model.modules() if _keeps_weights(kept) for m in kept.modules()}
        # Every module that holds a parameter: a tied one has several.
        self._places = [
            (module, name, p, weights[position[id(p)]])
            for module in model.modules()
            for name, p in module._parameters.items()
            if id(p) in position and module not in elsewhere
        ]
        standing = {w.place for *_, w in self._places}
        self._hooks = Hooks(model, self.params, self._filler)
        self._hooks.take([i for i in range(len(self.params)) if i not in standing])
        self._is_settled = False

    @property
    def seconds(self) -> float:
        """Time spent on noise."""
        return self._filler.seconds

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """The forwards of one step."""
        yield

    def release(self) -> None:
        """Give the scratch memory back until the next forward."""
        self._filler.release()

    def run(self, direction: Direction, forward: Callable[[], float]) -> float:
        """``forward()`` with every module of the model at θ + scale · z.

        Raises:
            RuntimeError: If a parameter's module, and every module around it, is never entered.
        """
        with self.at(direction):
            result = forward()
        # A closure may give up on a loss that is not finite before it has run the model.
        if not self._is_settled and math.isfinite(result):
            self._is_settled = True
            if self._settle():
                with self.at(direction):
                    result = forward()
        return result

    @contextlib.contextmanager
    def at(self, direction: Direction) -> Iterator[None]:
        """The model at the direction, inside the block."""
        with self.standing([direction]):
            yield

    @contextlib.contextmanager
    def standing(self, lanes: Sequence[Lane]) -> Iterator[Entry]:
        """Perturbed weights in the place of the parameters, inside the block."""
        hooks = (
            self._hooks.set(watch=not self._is_settled)
            if len(lanes) == 1
            else contextlib.nullcontext()
        )
        with self._entry.forward(lanes), hooks:
            try:
                for module, name, _, weight in self._places:
                    module._parameters[name] = weight  # type: ignore[assignment]
                yield self._entry
            finally:
                for module, name, p, _ in self._places:
                    module._parameters[name] = p

    @property
    def was_entered(self) -> bool:
        """Whether a forward of the model was watched."""
        return bool(self._hooks.entered)

    def unperturbed(self) -> str | None:
        """The name of a parameter that the forwards so far neither used nor filled, if any."""
        missed = {id(self.params[i]) for i in self._untouched()}
        return next((n for n, p in self.model.named_parameters() if id(p) in missed), None)

    def _untouched(self) -> list[int]:
        touched = self._entry.used | self._hooks.filled
        return [i for i in range(len(self.params)) if i not in touched]

    def _settle(self) -> bool:
        """Leave to the hooks what no operation has asked for; whether that is anything."""
        unused = self._untouched()
        if not unused:
            return False
        self._hooks.take(unused)
        self._hooks.adopt()
        self._places = [place for place in self._places if place[3].place not in unused]
        return True


def _head_of(model: nn.Module) -> nn.Parameter | None:
    """The weight that makes logits of hidden states, where the model says which it is."""
    base = getattr(model, "get_base_model", lambda: model)()
    head = getattr(base, "get_output_embeddings", lambda: None)()
    weight = head._parameters.get("weight") if isinstance(head, nn.Linear) else None
    return weight


def _keeps_weights(module: nn.Module) -> bool:
    # A recurrent layer passes a list of its own on, and a scripted one what it was compiled with;
    # attention of torch has a kernel that takes no stand-in for a weight.
    return isinstance(module, nn.RNNBase | nn.MultiheadAttention | torch.jit.ScriptModule)
