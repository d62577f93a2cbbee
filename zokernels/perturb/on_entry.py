"""The perturbed forward that leaves the stored weights alone.

While it runs, the parameters are `PerturbedWeight`s; what an operation asks for is made in scratch
memory of the size of the largest layer, and thrown away. Where no operation can be watched (in a
scripted module, or an extension) a parameter is filled as its module is entered.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from torch import nn

from zokernels.perturb import losses, operations  # noqa: F401  (they fill tables of operations)
from zokernels.perturb.direction import Direction
from zokernels.perturb.filling import Filler, Lane
from zokernels.perturb.hooks import Hooks
from zokernels.perturb.weight import Disguise, Entry, Misused, Unshareable


class OnEntry:
    """Perturbs each module's parameters in scratch memory while the module runs.

    Args:
        model: The module.
        params: Its parameters that are perturbed.
        lazy_logits: Make a language model's logits only where the loss looks at them.
        keep: Keep the memory of every perturbed weight, at the same addresses.
        filler: Makes the weights, if they are to be others.
        disguise: The kind of what lets parameters be those.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[nn.Parameter],
        lazy_logits: bool = True,
        keep: bool = False,
        filler: Filler | None = None,
        disguise: type[Disguise] = Disguise,
    ):
        self.model = model
        self.params = list(params)
        names = {id(p): name for name, p in model.named_parameters()}
        self._names = [names.get(id(p), str(i)) for i, p in enumerate(self.params)]
        self._filler = filler or Filler(self.params, keep)
        self._entry = Entry(self._filler, self._names, _head_of(model) if lazy_logits else None)
        self._disguise = disguise(self._entry)
        self._hooks = Hooks(model, self.params, self._filler, self._disguise)
        self._is_settled = False

    @property
    def seconds(self) -> float:
        """Time spent on noise."""
        return self._filler.seconds

    @property
    def matrices(self) -> int:
        """How many perturbed matrices were made in memory so far."""
        return self._filler.matrices

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """The forwards of one step."""
        yield

    def release(self) -> None:
        """Give the scratch memory back until the next forward."""
        self._filler.release()

    def run(self, direction: Direction, forward: Callable[[], float], again: bool = False) -> float:
        """``forward()`` with every module of the model at θ + scale · z.

        Args:
            direction: Where.
            forward: Returns the loss.
            again: Whether it has failed before hooks were in charge of what nobody asks for.

        Raises:
            RuntimeError: If a parameter's module, and every module around it, is never entered, or
                the forward works with plain weights only.
        """
        if self._is_settled:
            with self.at(direction):
                return forward()
        try:
            with self.at(direction):
                result = forward()
        except Misused:
            raise
        except (RuntimeError, TypeError) as error:
            if _is_of_memory(error):
                raise
            if not again and self.was_entered and self._settle():
                return self.run(direction, forward, again=True)
            _raise_as_it_is(error, forward)
        # A closure may give up before it has run the model.
        if self.was_entered or not self._untouched():
            unused = self._untouched()
            self._is_settled = True
            if self._settle():
                if math.isfinite(result):
                    # Nobody has read them: they were NaN.
                    self._hooks.drop(unused)
                    return result
                with self.at(direction):
                    result = forward()
            if math.isnan(result):
                self._tell_of_nan(forward)
        return result

    def _tell_of_nan(self, forward: Callable[[], float]) -> None:
        """Say that who reads weights where nobody watches sees NaN, if plain ones give none."""
        plain = forward()
        if math.isfinite(plain):
            warnings.warn(
                f"With perturbed weights the loss is NaN, and with plain ones {plain:g}. If a "
                "scripted or traced function or an extension reads the weights, use "
                "perturb='in_place'; otherwise a smaller eps.",
                stacklevel=2,
            )

    @contextlib.contextmanager
    def at(self, direction: Direction) -> Iterator[None]:
        """The model at the direction, inside the block."""
        with self.standing([direction]):
            yield

    @contextlib.contextmanager
    def standing(self, lanes: Sequence[Lane]) -> Iterator[Entry]:
        """The parameters are perturbed weights inside the block."""
        hooks = (
            self._hooks.set(watch=not self._is_settled)
            if len(lanes) == 1
            else contextlib.nullcontext()
        )
        with self._entry.forward(lanes), self._disguise.worn(), hooks:
            yield self._entry

    @property
    def was_entered(self) -> bool:
        """Whether a forward of the model was watched."""
        return bool(self._hooks.entered)

    def unperturbed(self) -> str | None:
        """The name of a parameter that the forwards so far neither used nor filled, if any."""
        return next((self._names[i] for i in self._untouched()), None)

    def check_watched(self) -> None:
        """Raise Unshareable if a module takes its weights where nobody can watch."""
        for holder in self._hooks.holders:
            kind = type(holder).__name__
            raise Unshareable(f"{kind} takes its weights where nobody can watch")

    def check_perturbed(self) -> None:
        """Raise RuntimeError if forwards ran, and a parameter was not perturbed in them."""
        missed = self.unperturbed()
        if self.was_entered and missed is not None:
            raise RuntimeError(
                f"Parameter {missed!r} was not perturbed, since no forward used it; use "
                "perturb='in_place'."
            )

    def _untouched(self) -> list[int]:
        touched = self._entry.used | self._hooks.filled
        return [i for i in range(len(self.params)) if i not in touched]

    def _settle(self) -> bool:
        """Leave to the hooks what no operation has asked for; whether that is anything."""
        unused = self._untouched()
        if unused:
            self._hooks.take(unused)
            self._hooks.adopt()
        return bool(unused)


def _is_of_memory(error: Exception) -> bool:
    """Whether memory ran out, which says nothing about the forward."""
    words = ("out of memory", "not enough memory", "allocate memory", "bad_alloc")
    return any(word in str(error) for word in words)


def _raise_as_it_is(error: Exception, forward: Callable[[], object]) -> NoReturn:
    """Raise what a perturbed forward raised, with a word about it if a plain one does not."""
    works = True
    try:
        forward()
    except Exception:
        works = False
    if not works:
        raise error
    raise RuntimeError(
        "The closure's forward works with plain weights, but not with perturbed ones: "
        f"{type(error).__name__}: {error} Use perturb='in_place'."
    ) from error


def _head_of(model: nn.Module) -> nn.Parameter | None:
    """The weight that makes logits of hidden states, where the model says which it is."""
    base = getattr(model, "get_base_model", lambda: model)()
    head = getattr(base, "get_output_embeddings", lambda: None)()
    return head._parameters.get("weight") if isinstance(head, nn.Linear) else None
