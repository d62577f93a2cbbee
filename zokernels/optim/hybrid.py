"""Hybrid: shallow layers by zeroth order, deep layers by backpropagation.

The shallow part runs without a graph, so that activations are stored for the deep part only.
Source: the benchmark of Zhang et al., ICML 2024, whose first 8 of 24 layers go by zeroth order.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from zokernels.estimators import Estimate
from zokernels.optim import blocks
from zokernels.optim.forward import Forward, explaining_gradients
from zokernels.optim.sgd import ZOSGD

Split = int | Callable[[str], bool]
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class HybridZO(ZOSGD):
    """ZO-SGD on the shallow part of a model, any torch optimizer on the rest, in one step.

    Two variants. By default the deep part's gradient is taken in a forward of its own, at θ. With
    ``reuse_forward`` it is taken in the estimate's first forward: one forward less, and the
    gradient is that at θ + εz; one-sided that forward is at θ anyway.

    The schedule of the deep part is its own optimizer's, ``opt.fo_optimizer``; `state_dict` holds
    both. A tied weight belongs to the part in which it comes first. With ``blocks`` the shallow
    part goes block by block, and the deep part takes its one step after the last of them.

    Args:
        model: The module.
        split: How many layers, after the embeddings, go by zeroth order; or a function of a
            parameter's name that says so.
        fo_optimizer: Makes the optimizer of the deep parameters from a list of them,
            ``lambda params: torch.optim.AdamW(params, lr=1e-5)``; or that optimizer itself.
        lr: Learning rate η of the shallow part.
        eps: Scale ε of its perturbation.
        reuse_forward: Take the gradient in the estimate's first forward. Where that is not at θ
            this perturbs in place, which keeps a copy of the shallow weights.
        **common: The keywords of `ZOOptimizer`, for the shallow part.

    Raises:
        TypeError: If ``model`` is no module.
        ValueError: If the split leaves a part without trainable parameters, ``fo_optimizer`` has
            not exactly those of the deep part, or an argument is out of range.
    """

    # Gradients by backpropagation can't be made again from scalars.
    replayable = False
    accumulates = False

    def __init__(
        self,
        model: nn.Module,
        split: Split,
        fo_optimizer: MakeOptimizer | torch.optim.Optimizer,
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        reuse_forward: bool = False,
        **common: Any,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}, but HybridZO needs the module.")
        shallow, deep = _parts(model, split)
        wanted, at_theta = common.get("perturb"), common.get("estimator") == "one_sided"
        if reuse_forward and (not at_theta or wanted == "paired"):
            if wanted in ("on_entry", "paired"):
                raise ValueError(
                    f"perturb={wanted!r} and reuse_forward=True were asked for, but the backward "
                    "of a perturbed forward needs the perturbed weights kept; leave one of them "
                    "out."
                )
            common["perturb"] = "in_place"
        if reuse_forward and common.get("blocks") is not None:
            raise ValueError(
                "blocks and reuse_forward=True were given, but a block's forward runs the layers "
                "after its start only, and the deep part needs a whole one; leave one of them out."
            )
        self.reuse_forward = reuse_forward
        if not isinstance(fo_optimizer, torch.optim.Optimizer):
            fo_optimizer = fo_optimizer(deep)
        self.fo_optimizer: torch.optim.Optimizer = fo_optimizer
        _check_parameters(self.fo_optimizer, deep, model)
        self._needs_gradient = True
        super().__init__(shallow, lr, eps, model=model, **common)
        if self.parallel.ranks > 1:
            raise ValueError(
                f"There are {self.parallel.ranks} processes, but HybridZO's deep part has "
                "gradients, and processes exchange scalars only here; run it in one process, or "
                "use ZOSGD."
            )

    def state_dict(self) -> dict[str, Any]:
        """Both optimizers' state."""
        return {**super().state_dict(), "fo_optimizer": self.fo_optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave.

        Raises:
            ValueError: If it is the state of another kind of optimizer.
        """
        rest = dict(state_dict)
        if "fo_optimizer" not in rest:
            raise ValueError(
                "The state has no 'fo_optimizer', so it was not saved by HybridZO; load what "
                "HybridZO's own state_dict() gave."
            )
        deep = rest.pop("fo_optimizer")
        super().load_state_dict(rest)
        self.fo_optimizer.load_state_dict(deep)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [self, self.fo_optimizer]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the deep part's gradients."""
        self.fo_optimizer.zero_grad(set_to_none)

    def _sweep(self, forward: Forward) -> list[Estimate]:
        self._needs_gradient = True
        found = super()._sweep(forward)
        if all(one.is_finite for one in found):
            self.fo_optimizer.step()
        return found

    def _estimate(self, forward: Forward, block: int | None) -> Estimate:
        # One gradient a step, whatever the number of blocks: that at the weights of its start.
        if not self._needs_gradient:
            return super()._estimate(forward, block)
        self._needs_gradient = False
        if self.reuse_forward:
            return super()._estimate(_FirstWithGradient(forward, self), block)  # type: ignore[arg-type]
        found = super()._estimate(forward, block)
        if found.is_finite:
            # The backward needs the memory.
            for perturber in self._perturbers.all():
                perturber.release()
            # A loss that is not finite makes a bad step, in which neither part moves.
            found.losses.append(self._backward(forward))
        return found

    def _backward(self, forward: Forward) -> float:
        """A forward whose graph begins at the deep part, and its backward.

        Returns:
            The loss; NaN where it is finite and its gradient is not, as float16 can have it.
        """
        started = time.perf_counter()
        with self._shallow_frozen(), torch.enable_grad():
            loss = forward()
            if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
                raise TypeError(
                    "The closure's loss has no graph, but HybridZO backpropagates through the deep "
                    "part; return the model's own loss, and use no torch.no_grad in the closure."
                )
            value = float(loss.detach())
            began = time.perf_counter()
            if math.isfinite(value):
                with explaining_gradients():
                    loss.backward()
            if not self.reuse_forward:
                self.timing.forwards += began - started
                self.timing.backward += time.perf_counter() - began
        deep = [p for group in self.fo_optimizer.param_groups for p in group["params"]]
        return value if all_finite(p.grad for p in deep) else math.nan

    @contextlib.contextmanager
    def _shallow_frozen(self) -> Iterator[None]:
        held = [g["params"][i] for g, chosen in self._chosen(None) for i in chosen]
        shallow = [p for p in held if p.requires_grad]
        for p in shallow:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in shallow:
                p.requires_grad_(True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> torch.Tensor:  # type: ignore[override]
        """One step of both parts; see `ZOOptimizer.step`."""
        self.zero_grad()
        try:
            return super().step(closure)
        finally:
            self.zero_grad()


def all_finite(gradients: Iterable[torch.Tensor | None]) -> bool:
    """Whether every gradient is finite; those that are None count as such."""
    return all(map(_is_finite, gradients))


def _is_finite(gradient: torch.Tensor | None) -> bool:
    # Least and largest: a NaN is both, and no temporary of the tensor's size is made.
    if gradient is None or not gradient.numel():
        return True
    return bool(torch.stack(torch.aminmax(gradient)).isfinite().all())


class _FirstWithGradient:
    """A forward whose first run is followed by its backward."""

    def __init__(self, forward: Forward, optimizer: HybridZO):
        self.forward, self.optimizer, self.done = forward, optimizer, False

    def __call__(self, perturbed: Sequence[nn.Parameter] = ()) -> torch.Tensor | float:
        if self.done:
            return self.forward(perturbed)
        self.done = True
        return self.optimizer._backward(self.forward)


def _parts(model: nn.Module, split: Split) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters of the shallow and of the deep part."""
    if callable(split):
        is_shallow = {id(p): bool(split(name)) for name, p in model.named_parameters()}
    else:
        layers = len(blocks.layers_of(model))
        if isinstance(split, bool) or not isinstance(split, int) or not 0 <= split <= layers:
            raise ValueError(
                f"split is {split!r}, but it must be a number of layers from 0 to {layers}, or a "
                "function from a parameter's name to whether it goes by zeroth order."
            )
        is_shallow = {i: number <= split for i, number in blocks.by_layer(model).items()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    shallow = [p for p in trainable if is_shallow[id(p)]]
    deep = [p for p in trainable if not is_shallow[id(p)]]
    if not shallow or not deep:
        raise ValueError(
            f"split={split!r} leaves the {'deep' if shallow else 'shallow'} part without a "
            "trainable parameter; use ZOSGD, or a torch optimizer, for the whole model."
        )
    return shallow, deep


def _check_parameters(
    optimizer: torch.optim.Optimizer, deep: list[nn.Parameter], model: nn.Module
) -> None:
    """Raise unless the optimizer of the deep part has its parameters, all of them and no other."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    wrong = held ^ {id(p) for p in deep}
    for name, p in model.named_parameters():
        if id(p) in wrong:
            which = "holds" if id(p) in held else "lacks"
            part = "is not in" if id(p) in held else "is in"
            raise ValueError(
                f"fo_optimizer {which} parameter {name!r}, which {part} the deep part; give a "
                "function that makes the optimizer from the list of deep parameters."
            )
    if wrong:
        raise ValueError(
            "fo_optimizer holds parameters that are not the model's; give a function that makes "
            "the optimizer from the list of deep parameters."
        )
