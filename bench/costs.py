"""Counting what a step costs: forwards, passes over the weights, state, temporary memory.

Nothing here is timed, so the numbers are the same on every machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import zokernels as zk
from zokernels.backends import native

LAYERS, WIDTH = 12, 256


@dataclass(frozen=True)
class Cost:
    """Of one step; passes, state and memory in units of the trainable weights.

    Attributes:
        forwards: Calls of the closure.
        perturbing: Passes that read the weights and write a perturbed copy of them, or a tangent.
        updating: Passes that read and write the weights.
        directions: Directions that the updating pass makes, for each weight.
        state: Bytes of the optimizer's tensors.
        temporary: Most bytes held at a time during a step, beyond those of a forward.
    """

    forwards: int
    perturbing: float
    updating: float
    directions: float
    state: float
    temporary: float


def model(dtype: torch.dtype) -> nn.Module:
    """Twelve equal layers, so that the largest one is a twelfth of the weights."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    return nn.Sequential(*layers).to(dtype)


def measure(
    make: Callable[[nn.Module], torch.optim.Optimizer], dtype: torch.dtype, warmup: int = 2
) -> Cost:
    """The cost of a step of the optimizer that ``make`` builds, once its state is there.

    Args:
        make: Builds the optimizer for the model.
        dtype: Of the weights.
        warmup: Steps before the one that is measured.
    """
    net = model(dtype)
    x = torch.ones(1, WIDTH, dtype=dtype)
    calls = []

    def closure() -> Any:
        calls.append(1)
        # Lower at every call, so that the conservative rule always finds a step to take.
        return net(x).float().square().mean() * 1e-6 + 1 / len(calls)

    opt = make(net)
    for _ in range(warmup):
        opt.step(closure)
    weights = [p for p in net.parameters() if p.requires_grad]
    size = sum(p.numel() for p in weights)
    nbytes = sum(p.numel() * p.element_size() for p in weights)
    with torch.no_grad():
        plain = peak(closure)
    calls.clear()
    with _counted() as seen:
        opt.step(closure)
    forwards = len(calls)

    # Scratch is kept from step to step, and counts as what a step needs.
    for perturber in opt._perturbers.all() if hasattr(opt, "_perturbers") else ():
        perturber.release()
    return Cost(
        forwards=forwards,
        perturbing=seen["add_noise"][0] / size,
        updating=(seen["add_noise_"][0] + seen["apply_update_"][0]) / size,
        directions=(seen["add_noise_"][1] + seen["apply_update_"][1]) / size,
        state=state_bytes(opt) / nbytes,
        temporary=(peak(lambda: opt.step(closure)) - plain) / nbytes,
    )


def state_bytes(opt: torch.optim.Optimizer) -> int:
    """Bytes of the tensors of more than one element in an optimizer's state."""
    values = [t for state in opt.state.values() for t in state.values()]
    tensors = [t for t in values if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors if t.numel() > 1)


def peak(run: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator gave out at a time during ``run``."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    results = recorded.profiler.kineto_results
    events = [e for e in results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@contextlib.contextmanager
def _counted() -> Iterator[dict[str, list[int]]]:
    """Counts each op's elements, and elements times directions."""
    seen: dict[str, list[int]] = {}

    def counting(name: str) -> Callable:
        op, count = getattr(zk.ops, name), seen.setdefault(name, [0, 0])
        # Where the seeds stand among the arguments.
        place = {"add_noise": 2, "add_noise_": 1, "apply_update_": 3}[name]

        def run(*args: object, **keywords: object) -> None:
            tensors = list(args[0])  # type: ignore[call-overload]
            elements = sum(p.numel() for p in tensors)
            # In place on what is no weight, a pass makes tangents.
            weights = all(isinstance(p, nn.Parameter) for p in tensors)
            of = count if weights or name == "add_noise" else seen["add_noise"]
            of[0] += elements
            of[1] += elements * len(args[place])  # type: ignore[arg-type]
            op(*args, **keywords)

        return run

    run_prepared, run_range = native.Prepared.run, native.Prepared.run_range

    def run(self: native.Prepared, seeds: list[int], coeffs: list[float]) -> None:
        seen["add_noise"][0] += sum(p.numel() for p in self.plan.params)
        run_prepared(self, seeds, coeffs)

    def run_part(
        self: native.Prepared, seeds: list[int], coeffs: list[float], begin: int, end: int
    ) -> None:
        seen["add_noise"][0] += end - begin
        run_range(self, seeds, coeffs, begin, end)

    with contextlib.ExitStack() as stack:
        # What a perturbed forward makes on a CPU does not pass through the ops.
        stack.enter_context(mock.patch.object(native.Prepared, "run", run))
        stack.enter_context(mock.patch.object(native.Prepared, "run_range", run_part))
        for name in ("add_noise", "add_noise_", "apply_update_"):
            stack.enter_context(mock.patch.object(zk.ops, name, counting(name)))
        yield seen
