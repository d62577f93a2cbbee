"""What a step must hold in memory, by arithmetic: shapes are traced, nothing is computed.

The model's forward, and where there is one its backward, run on tensors without memory
(`FakeTensorMode`), and what is alive at a time is added up. So the numbers hold for any
configuration, also for one that no machine at hand could run. What a library takes for itself,
and what an allocator can't give back, is not in them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zokernels.lab.benchmarks import models
from zokernels.perturb import filling, windows
from zokernels.perturb import logits as lazy
from zokernels.perturb.layers import layers_of


@dataclass(frozen=True)
class Cell:
    """A step whose memory is asked for: ``rows`` sequences of ``length`` tokens.

    ``points`` of "paired" share a forward; the step has half as many queries.
    """

    model: str
    optimizer: str
    rows: int
    length: int
    dtype: str = "float32"
    perturb: str = "on_entry"
    device: str = "cpu"
    dist: str = "gaussian"
    points: int = 2


@dataclass(frozen=True)
class Footprint:
    """Bytes that a step holds at its peak.

    Attributes:
        weights: The model.
        state: The optimizer's.
        scratch: Perturbed weights, tangents, or a copy of the weights.
        run: The most that activations, logits and gradients take at a time.
    """

    weights: int
    state: int
    scratch: int
    run: int

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.state + self.scratch + self.run


@dataclass(frozen=True)
class Kind:
    """What an optimizer keeps, for each weight that it trains.

    Attributes:
        states: Numbers of its state.
        wide: Whether these are float32 whatever the weights are, or of the weights' type.
        backward: Which layers go by backpropagation: "none", "all", or "deep" ones.
        tangent: Whether it makes tangents instead of perturbed weights.
        plain: Whether it also asks for the loss at the weights themselves, whose logits don't wait.
        perturbs: Whether it makes perturbed weights or tangents.
    """

    states: int = 0
    wide: bool = True
    backward: str = "none"
    tangent: bool = False
    plain: bool = False
    perturbs: bool = True


KINDS = {
    "inference": Kind(plain=True, perturbs=False),
    "zo-sgd": Kind(),
    "zo-sgd-sign": Kind(),
    "zo-sgd-cons": Kind(plain=True),
    "zo-sgd-mmt": Kind(states=1),
    "zo-adam": Kind(states=3),
    "forward-grad": Kind(tangent=True),
    "hybrid": Kind(states=2, wide=False, backward="deep"),
    "fo-sgd": Kind(backward="all", perturbs=False),
    "fo-adam": Kind(states=2, wide=False, backward="all", perturbs=False),
}


def of(cell: Cell) -> Footprint:
    """The bytes of every part."""
    kind, dtype = KINDS[cell.optimizer], getattr(torch, cell.dtype)
    shape = _shape(cell.model)
    moved = shape.deep if kind.backward == "deep" else shape.weights
    device = cell.device.partition(":")[0]
    way = _way(cell, kind)
    rows = cell.rows * (cell.points if way == "paired" else 1)
    run = _run(cell.model, rows, cell.length, dtype, way, device)
    if kind.backward != "none":
        # An update holds two tensors of the size of a parameter's besides the gradients; on CUDA
        # torch.optim takes all parameters in one call, and holds one of each.
        largest = shape.layer if kind.backward == "deep" else shape.largest
        besides = 2 * largest if device == "cpu" else moved
        update = (moved + besides) * dtype.itemsize
        run = max(run, update) if kind.states else run
    return Footprint(
        weights=shape.weights * dtype.itemsize,
        state=moved * kind.states * (4 if kind.wide else dtype.itemsize),
        scratch=_scratch(cell, kind, shape, dtype),
        run=run,
    )


def split(layers: int) -> int:
    """How many layers `hybrid` trains by zeroth order: a third of them, as in the paper."""
    return layers // 3


def _deep(model: nn.Module) -> list[nn.Module]:
    layers = layers_of(model)
    return layers[split(len(layers)) :]


@dataclass(frozen=True)
class _Shape:
    """Numbers of weights.

    Attributes:
        weights: All.
        largest: The largest parameter.
        layer: The largest parameter that is no table of embeddings and no head.
        table: The largest table of embeddings.
        small: Of the small parameters, those that are perturbed together.
        vectors: Rows and columns of all matrices.
        lines: All parameters of one dimension.
        deep: Those of the layers that `hybrid` trains by backpropagation.
    """

    weights: int
    largest: int
    layer: int
    table: int
    small: int
    vectors: int
    lines: int
    deep: int


@cache
def _shape(name: str) -> _Shape:
    with torch.device("meta"):
        model = models.empty(name)
    params = list(model.parameters())
    table = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    inner = [p.numel() for p in params if id(p) not in table]
    head = model.get_output_embeddings().weight
    deep = [p for layer in _deep(model) for p in layer.parameters()]
    return _Shape(
        weights=sum(p.numel() for p in params),
        largest=max(p.numel() for p in params),
        layer=max(n for n in inner if n != head.numel()),
        table=max(p.numel() for p in params if id(p) in table),
        small=min(windows.GROUP, sum(n for n in inner if n <= filling.SMALL)),
        vectors=sum(sum(p.shape) for p in params if p.dim() == 2),
        lines=sum(p.numel() for p in params if p.dim() == 1),
        deep=sum(p.numel() for p in deep),
    )


def _scratch(cell: Cell, kind: Kind, shape: _Shape, dtype: torch.dtype) -> int:
    if not kind.perturbs:
        return 0
    if cell.perturb == "in_place" and not kind.tangent:
        return shape.weights * dtype.itemsize
    if kind.tangent:
        # A tangent is of a parameter as a whole, also of a table of embeddings.
        return shape.largest * dtype.itemsize
    lanes = cell.points if cell.perturb == "paired" else 1
    if cell.dist == "rank1":
        # Of float32 what a pass begins from; for each point what it draws, and the signs of that.
        vectors = shape.vectors * (4 + lanes * (4 + dtype.itemsize))
        return vectors + lanes * shape.lines * dtype.itemsize
    # Of a table of embeddings the CPU's kernels make the rows that are looked up, others all.
    layer = shape.layer if cell.device == "cpu" else max(shape.layer, shape.table)
    return lanes * (layer + shape.small) * dtype.itemsize


def _way(cell: Cell, kind: Kind) -> str:
    if kind.backward != "none":
        return kind.backward
    if kind.tangent:
        return "tangent"
    return "plain" if kind.plain or cell.perturb == "in_place" else cell.perturb


@cache
def _run(
    name: str, rows: int, length: int, dtype: torch.dtype, way: str, device: str = "cpu"
) -> int:
    """The most bytes alive at a time besides the weights and the state."""
    with FakeTensorMode(), contextlib.ExitStack() as stack:
        model = models.empty(name, dtype).eval()
        inputs = models.batch(model, rows, length, caches=False)
        if way == "deep":
            model.requires_grad_(False)
            for layer in _deep(model):
                layer.requires_grad_(True)
        if way == "tangent":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if way not in ("all", "deep"):
            stack.enter_context(torch.no_grad())
        body = {k: v for k, v in inputs.items() if k != "labels"}
        with _counting(model) as live:
            if way in ("on_entry", "paired"):
                model.base_model(**body)
            elif way in ("all", "deep"):
                model(**inputs).loss.backward()
            else:
                model(**inputs)
    if way in ("on_entry", "paired"):
        return max(live.most, _head(model, inputs["input_ids"].numel(), dtype, device))
    # A tangent goes beside every activation.
    return live.most * (2 if way == "tangent" else 1)


def _head(model: Any, tokens: int, dtype: torch.dtype, device: str) -> int:
    """The hidden states, a part of the head, its logits, and these as float32 twice."""
    vocabulary, width = model.get_output_embeddings().weight.shape
    part = lazy.rows_of_a_part(width, dtype, device)
    part = min(part, vocabulary)
    return tokens * width * dtype.itemsize * 2 + tokens * part * (dtype.itemsize + 8)


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.held, self.now, self.most = dict.fromkeys(known, 0), 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self._see(t.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.held:
            return
        self.held[key] = storage.nbytes()
        self.now += self.held[key]
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.held.pop(key)


@contextlib.contextmanager
def _counting(model: nn.Module) -> Iterator[_Live]:
    held = [*model.parameters(), *model.buffers()]
    with _Live({t.untyped_storage()._cdata for t in held}) as live:
        yield live
