"""Forward gradient: d = ∇L·z by one forward-mode pass, ĝ = (1/q) Σ dₖ zₖ, θ ← (1 − η·wd)·θ − η ĝ.

Unbiased and without a difference, hence without ε. Source: Baydin et al., "Gradients without
backpropagation", 2022; the benchmark of Zhang et al., ICML 2024.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from zokernels import masks, passes
from zokernels.backends import shards, tracer
from zokernels.estimators import Estimate
from zokernels.optim.forward import Forward
from zokernels.optim.groups import Chosen, join_masks
from zokernels.optim.sgd import ZOSGD


class ForwardGrad(ZOSGD):
    """SGD along forward gradients: one forward-mode pass a query, and no state.

    Given a module, a layer's tangent is made as the layer is entered and dropped as it is left;
    given parameters only, all tangents are set before the pass (1 × the trainable weights). In
    16-bit weights the tangent is z rounded to their type.

    Args:
        params: As in `ZOOptimizer`, and so are ``lr`` and the common keywords.
        lr: Learning rate η.
        eps: Without effect, as is ``two_sided``: there is no difference. Both are taken so that
            all optimizers can be made alike.
        two_sided: See ``eps``.
        perturb: ``"on_entry"`` (default for a module) or ``"in_place"`` (all tangents at once).
        **common: The keywords of `ZOOptimizer`.

    Raises:
        ValueError: If an argument is out of range.
    """

    accumulates = False
    _layers: _Layers | None = None

    def __init__(
        self,
        params: Any,
        lr: float = 1e-6,
        eps: float = 1.0,
        *,
        two_sided: bool = False,
        perturb: str | None = None,
        **common: Any,
    ):
        if perturb == "paired":
            raise ValueError(
                "perturb='paired' was asked for, but ForwardGrad has one forward a direction and "
                "nothing to pair; use None, 'on_entry' or 'in_place'."
            )
        # With ε = 1 a difference over ε is the derivative itself.
        super().__init__(params, lr, 1.0, two_sided=False, perturb=perturb, **common)
        self._refuse_shards()
        self._layers: _Layers | None = None

    def _refuse_shards(self) -> None:
        if any(shards.is_sharded(p) for group in self.param_groups for p in group["params"]):
            raise ValueError(
                "The weights are cut over processes (DTensors), through whose gathering no "
                "forward-mode derivative goes; use ZOSGD, or whole weights in each process."
            )

    def _goes_on_from(self, rule: str) -> bool:
        # An eps of 1 and one side mean something else to it than to a rule of differences.
        return rule != "ZOSGD" and super()._goes_on_from(rule)

    def _look(self) -> None:
        super()._look()
        self._refuse_shards()

    def _forget(self) -> None:
        super()._forget()
        self._layers = None

    def _sweep(self, forward: Forward) -> list[Estimate]:
        # All forwards of a step go the same way, those without a tangent too; what is compiled has
        # no forward-mode derivative.
        with _differentiable_attention(), tracer.eager():
            return super()._sweep(forward)

    def _estimate(self, forward: Forward, block: int | None) -> Estimate:
        groups = self._chosen(block)

        def along(seeds: list[int]) -> Estimate:
            pairs = [self._differentiate(forward, block, groups, seed) for seed in seeds]
            losses, slopes = [loss for loss, _ in pairs], [slope for _, slope in pairs]
            return Estimate(seeds, losses, slopes, sum(losses) / len(losses))

        return self.parallel.join(along, self._seeds(block), self)

    def _differentiate(
        self, forward: Forward, block: int | None, groups: Chosen, seed: int
    ) -> tuple[float, float]:
        """L(θ) and ∇L·z."""
        started = time.perf_counter()
        params = [g["params"][i] for g, chosen in groups for i in chosen]
        tangents = _Tangents(
            params,
            [g["streams"][i] for g, chosen in groups for i in chosen],
            seed,
            self.param_groups[0]["dist"],
            join_masks(groups),
            self.backend,
        )
        if self.perturb == "in_place":
            value, slope = self._pass(forward, block, params, tangents.everywhere())
        else:
            layers = self._layers_of(params)
            value, slope = self._pass(forward, block, params, layers.carry(tangents))
            # With blocks, what comes from memory enters no layer before the block.
            if math.isfinite(value) and layers.adopt():
                value, slope = self._pass(forward, block, params, layers.carry(tangents))
        if slope is None:
            # A closure may give up on a loss that is not finite before it has run the model.
            if math.isfinite(value):
                raise RuntimeError(
                    "The loss has no tangent: the closure ran none of the trainable parameters, or "
                    "ran them under torch.inference_mode, or detached the loss; return the model's "
                    "own loss."
                )
            slope = math.nan
        self.timing.noise += tangents.seconds
        self.timing.forwards += time.perf_counter() - started - tangents.seconds
        return value, slope

    def _pass(
        self,
        forward: Forward,
        block: int | None,
        params: list[nn.Parameter],
        carrying: contextlib.AbstractContextManager[None],
    ) -> tuple[float, float | None]:
        """L(θ), and ∇L·z if the loss has a tangent."""
        with forward_ad.dual_level(), carrying:
            try:
                if block is None:
                    loss: Any = forward()
                else:
                    loss = self._perturbers.prefix.run(forward, params)
            except (RuntimeError, NotImplementedError) as error:
                raise _explained(error) from error
            if not isinstance(loss, torch.Tensor):
                raise TypeError(
                    f"The closure returned a {type(loss).__name__}, but ForwardGrad takes the "
                    "derivative of the loss itself; return the tensor."
                )
            value, slope = forward_ad.unpack_dual(loss)
        return float(value), None if slope is None else float(slope)

    def _layers_of(self, params: list[nn.Parameter]) -> _Layers:
        assert self.model is not None
        if self._layers is None or list(map(id, self._layers.params)) != list(map(id, params)):
            self._layers = _Layers(self.model, params)
        return self._layers


class _Tangents:
    """The direction z of one query, made where it is needed."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        streams: Sequence[int],
        seed: int,
        dist: str,
        mask: masks.Mask | None,
        backend: str | None,
    ):
        self.params, self.streams, self.seed = params, streams, seed
        self.dist, self.mask, self.backend = dist, mask, backend
        self.seconds = 0.0

    def of(self, chosen: Sequence[int]) -> list[torch.Tensor]:
        """Z of some of the parameters, 0 outside the mask."""
        started = time.perf_counter()
        weights = [self.params[i].detach() for i in chosen]
        made = [torch.zeros(w.shape, dtype=w.dtype, device=w.device) for w in weights]
        mask = masks.take(self.mask, chosen)
        magnitude = isinstance(mask, masks.Magnitude)
        passes.add_noise_(
            made,
            [self.seed],
            [1.0],
            streams=[self.streams[i] for i in chosen],
            dist=self.dist,
            # By magnitude it is the weights that are judged, not what is being made.
            mask=None if magnitude else mask,
            backend=self.backend,
        )
        if isinstance(mask, masks.Magnitude):
            for z, w, kept in zip(made, weights, masks.kept(mask, weights), strict=True):
                z.mul_(kept.view_as(w))
        self.seconds += time.perf_counter() - started
        return made

    @contextlib.contextmanager
    def everywhere(self) -> Iterator[None]:
        """Inside the block the parameters themselves carry their tangents."""
        for p, z in zip(self.params, self.of(range(len(self.params))), strict=True):
            # A copy of the weights' own values leaves every bit, and brings the tangent.
            p.copy_(forward_ad.make_dual(p.detach().clone(), z))
        yield


class _Layers:
    """Puts tangents on each module's parameters while the module runs."""

    def __init__(self, model: nn.Module, params: Sequence[nn.Parameter]):
        self.params = params
        self.names = {id(p): name for name, p in model.named_parameters()}
        self._parents = {child: m for m in model.modules() for child in m.children()}
        self._entered: set[nn.Module] = set()
        self._filled: set[int] = set()
        places = {id(p): i for i, p in enumerate(params)}
        # Whose parameters a module brings: (owner, name, place of the parameter).
        self._brings: dict[nn.Module, list[tuple[nn.Module, str, int]]] = {
            module: [
                (module, name, places[id(p)])
                for name, p in module._parameters.items()
                if p is not None and id(p) in places
            ]
            for module in model.modules()
        }

    @contextlib.contextmanager
    def carry(self, tangents: _Tangents) -> Iterator[None]:
        """Inside the block the forward carries the direction, layer by layer."""
        self._filled = set()
        open_modules: dict[nn.Module, list[list[tuple[nn.Module, str, Any]]]] = {}

        def enter(module: nn.Module, _args: object) -> None:
            self._entered.add(module)
            brings = self._brings[module]
            saved = [(owner, name, owner._parameters[name]) for owner, name, _ in brings]
            open_modules.setdefault(module, []).append(saved)
            places = [i for _, _, i in brings]
            self._filled.update(places)
            for (owner, name, i), z in zip(brings, tangents.of(places), strict=True):
                dual = forward_ad.make_dual(self.params[i].detach(), z)
                owner._parameters[name] = dual

        def leave(module: nn.Module, _args: object, _output: object) -> None:
            if open_modules.get(module):
                _put_back(open_modules[module].pop())

        hooks = []
        try:
            for module in self._brings:
                hooks.append(module.register_forward_pre_hook(enter))
                hooks.append(module.register_forward_hook(leave, always_call=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for stack in open_modules.values():
                for saved in reversed(stack):
                    _put_back(saved)

    def adopt(self) -> bool:
        """Give parameters whose module was passed by to the nearest entered one around it.

        Returns:
            Whether there were any, so that the pass must be run again.

        Raises:
            RuntimeError: If no module around one was entered.
        """
        missed = [i for i in range(len(self.params)) if i not in self._filled]
        for i in missed:
            owner, name = next(
                (owner, name) for b in self._brings.values() for owner, name, j in b if j == i
            )
            around = self._parents.get(owner)
            while around is not None and around not in self._entered:
                around = self._parents.get(around)
            if around is None:
                raise RuntimeError(
                    f"Parameter {self.names[id(self.params[i])]!r} is trainable, but neither its "
                    "module nor one around it was entered by the closure's forward; call the "
                    "model itself, or freeze the parameter."
                )
            for brings in self._brings.values():
                brings[:] = [entry for entry in brings if entry[2] != i]
            self._brings[around].append((owner, name, i))
        return bool(missed)


def _put_back(saved: list[tuple[nn.Module, str, Any]]) -> None:
    for owner, name, parameter in saved:
        owner._parameters[name] = parameter


@contextlib.contextmanager
def _differentiable_attention() -> Iterator[None]:
    """Attention by plain products: the fused kinds have no forward-mode rule on CPU."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _explained(error: Exception) -> Exception:
    text = str(error).splitlines()[0]
    if not any(words in str(error) for words in ("forward AD", "forward mode AD", "forward-mode")):
        return error
    if "mkldnn" in text or "cudnn" in text:
        library = "mkldnn" if "mkldnn" in text else "cudnn"
        way = f"Run the steps inside torch.backends.{library}.flags(enabled=False)"
    elif "autograd.Function" in text:
        way = "Load the model without fused kernels (attn_implementation='eager'), or write a jvp"
    elif "attention" in text or "attn" in text:
        way = "Load the model with attn_implementation='eager'"
    else:
        way = "Write it with operations that have one"
    return RuntimeError(
        f"An operation of the model has no forward-mode derivative: {text} {way}, or use ZOSGD, "
        "which needs none."
    )
