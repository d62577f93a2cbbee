"""The perturbed forward: the model at θ + scale · z, with the stored weights safe.

`OnEntry` fills a scratch buffer as each layer is entered and throws it away when it is left, so
that memory grows by the largest layer only. `InPlace` writes the weights themselves, from a copy.
Neither ever adds and then subtracts: what was stored comes back bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from zokernels import masks, ops, shards


class Move(NamedTuple):
    """How a parameter moves along K directions: w ↦ decay · w + Σₖ scaleₖ · zₖ, rounded once."""

    scales: tuple[float, ...]
    decay: float = 1.0
    rounding: str = "nearest"


@dataclass
class Direction:
    """Trainable parameters and the K seeds of the noise that moves them.

    ``params``, ``streams`` and ``moves`` have one entry a parameter.
    """

    params: Sequence[nn.Parameter]
    streams: Sequence[int]
    moves: Sequence[Move]
    seeds: Sequence[int]
    dist: str = "gaussian"
    mask: masks.Mask | None = None
    backend: str | None = None
    rounding_seed: int = 0

    def fill(self, sources: Sequence[torch.Tensor], out: list, chosen: Sequence[int]) -> None:
        """Write the moved values of the chosen parameters into ``out``."""
        alike: dict[Move, list[int]] = {}
        for place, i in enumerate(chosen):
            alike.setdefault(self.moves[i], []).append(place)
        for move, places in alike.items():
            ops.add_noise(
                [sources[j] for j in places],
                [out[j] for j in places],
                self.seeds,
                move.scales,
                streams=[self.streams[chosen[j]] for j in places],
                dist=self.dist,
                mask=masks.take(self.mask, [chosen[j] for j in places]),
                decay=move.decay,
                rounding=move.rounding,
                rounding_seed=self.rounding_seed,
                backend=self.backend,
            )


class InPlace:
    """Perturbs the weights themselves, from a copy of them (1 × the trainable weights)."""

    def __init__(self, params: Sequence[nn.Parameter]):
        self.params = list(params)
        self.copies: list[torch.Tensor] | None = None
        self.seconds = 0.0

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Keep the copy from here to the end of the block."""
        started = time.perf_counter()
        self.copies = [p.detach().clone() for p in self.params]
        self.seconds += time.perf_counter() - started
        try:
            yield
        finally:
            self.copies = None

    @contextlib.contextmanager
    def at(self, direction: Direction) -> Iterator[None]:
        """The weights at θ + scale · z inside the block, and as they were after it."""
        with contextlib.nullcontext() if self.copies is not None else self.session():
            assert self.copies is not None
            started = time.perf_counter()
            out = [p.detach() for p in self.params]
            try:
                direction.fill(self.copies, out, range(len(out)))
                self.seconds += time.perf_counter() - started
                yield
            finally:
                started = time.perf_counter()
                for target, copy in zip(out, self.copies, strict=True):
                    target.copy_(copy)
                self.seconds += time.perf_counter() - started


@dataclass
class _Entered:
    """What a module holds while it runs: its parameters' own storage, and its part of scratch."""

    saved: list[tuple[nn.Parameter, torch.Tensor]] = field(default_factory=list)
    buffers: list[torch.Tensor] = field(default_factory=list)


class OnEntry:
    """Perturbs each module's parameters in scratch memory while the module runs."""

    def __init__(self, model: nn.Module, params: Sequence[nn.Parameter]):
        self.model = model
        self.params = list(params)
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.seconds = 0.0
        position = {id(p): i for i, p in enumerate(self.params)}
        # Every module that holds a parameter: a tied one has several.
        self.owned: dict[nn.Module, list[int]] = {}
        for module in model.modules():
            mine = [position[id(p)] for p in module._parameters.values() if id(p) in position]
            if mine:
                self.owned[module] = list(dict.fromkeys(mine))
        self._parents = {child: m for m in model.modules() for child in m.children()}
        self._entered_once: set[nn.Module] = set()
        self._scratch: list[torch.Tensor] = []

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Keep the scratch memory from here to the end of the block."""
        try:
            yield
        finally:
            self._scratch.clear()

    def run(self, direction: Direction, forward: Callable[[], float]) -> float:
        """``forward()`` with every module of the model at θ + scale · z.

        Raises:
            RuntimeError: If a parameter's module, and every module around it, is never entered.
        """
        with self.at(direction) as filled:
            result = forward()
        # A closure may give up on a loss that is not finite before it has run the model.
        if math.isfinite(result) and self._adopt(filled):
            # A module was passed by: its weights are now filled by one around it.
            with self.at(direction) as filled:
                result = forward()
        return result

    @contextlib.contextmanager
    def at(self, direction: Direction) -> Iterator[set[int]]:
        """Hooks that perturb, inside the block; yields the set of parameters filled so far."""
        filled: set[int] = set()
        open_modules: dict[nn.Module, list[_Entered]] = {}
        hooks = []

        def enter(module: nn.Module, _args: object) -> None:
            self._entered_once.add(module)
            chosen = self.owned.get(module)
            if chosen:
                started = time.perf_counter()
                inner = {id(p) for e in open_modules.values() for x in e for p, _ in x.saved}
                chosen = [i for i in chosen if id(self.params[i]) not in inner]
                entered = _Entered()
                open_modules.setdefault(module, []).append(entered)
                self._swap_in(direction, chosen, entered)
                filled.update(chosen)
                self.seconds += time.perf_counter() - started

        def leave(module: nn.Module, _args: object, output: object) -> object:
            stack = open_modules.get(module)
            if not stack:
                return None
            entered = stack.pop()
            for p, stored in entered.saved:
                p.data = stored
            self._scratch.extend(entered.buffers)
            memory = {b.untyped_storage().data_ptr() for b in entered.buffers}
            return _own_memory(output, memory)

        watched = self.model.modules() if self._unseen() else self.owned
        try:
            for module in watched:
                hooks.append(module.register_forward_pre_hook(enter))
                hooks.append(module.register_forward_hook(leave, always_call=True))
            yield filled
        finally:
            for hook in hooks:
                hook.remove()
            for stack in open_modules.values():
                for entered in stack:
                    for p, stored in entered.saved:
                        p.data = stored

    def _unseen(self) -> bool:
        return any(m not in self._entered_once for m in self.owned)

    def _swap_in(self, direction: Direction, chosen: Sequence[int], entered: _Entered) -> None:
        sources = [self.params[i].detach() for i in chosen]
        out = []
        for source in sources:
            buffer = self._take(source)
            entered.buffers.append(buffer)
            out.append(buffer[: source.numel()].view(source.shape))
        direction.fill(sources, out, chosen)
        for i, source, perturbed in zip(chosen, sources, out, strict=True):
            entered.saved.append((self.params[i], source))
            self.params[i].data = perturbed

    def _take(self, like: torch.Tensor) -> torch.Tensor:
        """A free piece of scratch for this tensor, kept for the next layer once it is given back.

        The smallest that is large enough; if there is none, a new one replaces the largest, so
        that scratch stays near the largest layer.
        """
        fitting = [b for b in self._scratch if b.dtype == like.dtype and b.device == like.device]
        enough = [b for b in fitting if b.numel() >= like.numel()]
        best = min(
            enough or fitting, key=lambda b: b.numel() if enough else -b.numel(), default=None
        )
        if best is not None:
            self._scratch = [b for b in self._scratch if b is not best]
            if enough:
                return best
        return torch.empty(like.numel(), dtype=like.dtype, device=like.device)

    def _adopt(self, filled: set[int]) -> bool:
        """Give parameters that no entered module filled to the nearest entered one around them."""
        owners = {i for m, chosen in self.owned.items() if m in self._entered_once for i in chosen}
        orphans = [i for i in range(len(self.params)) if i not in owners and i not in filled]
        for i in orphans:
            holder = next(m for m, chosen in self.owned.items() if i in chosen)
            around = self._parents.get(holder)
            while around is not None and around not in self._entered_once:
                around = self._parents.get(around)
            if around is None:
                raise RuntimeError(
                    f"Parameter {self.names[id(self.params[i])]!r} is trainable, but neither its "
                    "module nor one around it was entered by the closure's forward, so it can't "
                    "be perturbed on entry; call the model itself, freeze the parameter, or use "
                    "perturb='in_place'."
                )
            self.owned[holder] = [j for j in self.owned[holder] if j != i]
            self.owned[around] = [*self.owned.get(around, []), i]
        self.owned = {m: chosen for m, chosen in self.owned.items() if chosen}
        return bool(orphans)


def _own_memory(output: object, scratch: set[int]) -> object:
    """The output with views of scratch replaced by copies; None if there are none."""
    found = False

    def own(t: torch.Tensor) -> torch.Tensor:
        nonlocal found
        if t.layout is torch.strided and t.untyped_storage().data_ptr() in scratch and t.numel():
            found = True
            return t.clone()
        return t

    replaced = own(output) if isinstance(output, torch.Tensor) else None
    if replaced is None:
        replaced = tree_map_only(torch.Tensor, own, output)
    return replaced if found else None


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has a hand in the model: hooks added later would be ignored."""
    return any(
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )


def choose_mode(model: nn.Module | None, wanted: str | None) -> str:
    """``"on_entry"`` or ``"in_place"``: what was asked for, or the best that works.

    Raises:
        ValueError: If the mode is unknown or cannot work.
    """
    if wanted not in (None, "on_entry", "in_place"):
        raise ValueError(f"perturb is {wanted!r}, but it must be None, 'on_entry' or 'in_place'.")
    if model is None:
        if wanted == "on_entry":
            raise ValueError(
                "perturb='on_entry' needs the module, but only parameters were given; pass the "
                "module itself, or use perturb='in_place'."
            )
        return "in_place"
    if shards.of_model(model):
        if wanted == "on_entry":
            raise ValueError(
                "perturb='on_entry' was asked for, but the weights are cut over processes, which "
                "perturb their own parts before they are gathered; use perturb='in_place'."
            )
        return "in_place"
    if is_compiled(model):
        if wanted == "on_entry":
            raise ValueError(
                "perturb='on_entry' was asked for, but the model is compiled and ignores hooks "
                "added later; use perturb='in_place', or pass the model before torch.compile."
            )
        if wanted is None:
            warnings.warn(
                "The model is compiled and ignores hooks added later: perturbing in place, which "
                "keeps a copy of the trainable weights.",
                stacklevel=4,
            )
        return "in_place"
    return wanted or "on_entry"


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
        dist: ``"gaussian"`` or ``"rademacher"``.
        mask: One of `zokernels.masks`, with one entry a trainable parameter where it is a list.
        perturb: ``"on_entry"`` (the default), or ``"in_place"``. On entry, a parameter whose own
            module the forward never enters is not perturbed in this context: it raises at its end.
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
        if choose_mode(model, perturb) == "in_place":
            with InPlace(params).at(direction):
                yield model
            return
        layers = OnEntry(model, params)
        with layers.at(direction) as filled:
            yield model
        if layers._entered_once and len(filled) < len(params):
            missed = next(i for i in range(len(params)) if i not in filled)
            raise RuntimeError(
                f"Parameter {layers.names[id(params[missed])]!r} was not perturbed, since no "
                "forward entered its module; use perturb='in_place'."
            )
