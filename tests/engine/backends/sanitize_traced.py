"""Native passes from code that the tracer of torch.compile rewrites; sanitize.py runs it.

The tracer drops a local that is not used again: memory that only an address is left of is freed
before the pass reads it. Here the tracer is let in on purpose; the ops themselves keep it out.
"""

import sys
from pathlib import Path

import torch

from zokernels import noise
from zokernels.backends import checks, native
from zokernels.backends.plan import AddNoise

native.LIBRARY = Path(sys.argv[1])


def planned(tensors: list[torch.Tensor], out: list[torch.Tensor]) -> AddNoise:
    return AddNoise(**checks.numbers_of_pass(tensors, [7], [0.5]), out=out)


def main() -> None:
    weight = torch.linspace(-1, 1, 37 * 19).view(37, 19)
    rows = torch.tensor([3, 0, 36, 3, 11] * 9)
    out, mirror = torch.empty(len(rows), 19), torch.empty(len(rows), 19)

    def looked_up() -> None:
        native.Prepared(planned([weight], [out]), [mirror]).run_rows([7], [0.5], rows)

    def whole() -> None:
        native.add_noise(planned([weight], [moved]))

    moved = torch.empty_like(weight)
    for run in (looked_up, whole):
        # Often: what is freed is not overwritten at once.
        compiled = torch.compile(run, backend="eager")
        for _ in range(3):
            compiled()
    z = noise.gaussian(weight.numel(), seed=7).view(37, 19)
    assert torch.allclose(moved, weight + 0.5 * z, atol=1e-6)
    assert torch.equal(out, moved[rows])
    assert torch.allclose(mirror, (weight - 0.5 * z)[rows], atol=1e-6)
    print("traced passes")


if __name__ == "__main__":
    main()
