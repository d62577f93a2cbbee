"""Bytes of a frozen base in few bits: ``python -m bench.quantised``, half a minute.

By arithmetic for the models of the presets, and of OPT-125M beside what its tensors hold once
bitsandbytes made them. Writes bench/results/quantised.csv; `make report` makes the table of
docs/memory.md.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch

from zokernels.lab.benchmarks import machine, models, results
from zokernels.lab.models import loading, quantised

RESULTS = results.FOLDER / "quantised.csv"
NAMES = ("opt-125m", "roberta-large", "opt-1.3b", "llama-2-7b", "mistral-7b", "opt-13b")
MEASURED = "opt-125m"
# Beside bfloat16, the type of what is not quantised.
KINDS = ("bfloat16", *quantised.KINDS)
COLUMNS = (
    "date", "commit", "machine", "python", "torch", "model", "kind", "mib", "measured_mib",
)  # fmt: skip
# Of nf4: weights that share a scale of float32.
_BLOCK = 64


def arithmetic(name: str, kind: str) -> int:
    """Bytes of a model's weights: its matrices but the head in few bits, all else in bfloat16."""
    with torch.device("meta"):
        model = models.empty(name)
    head = model.get_output_embeddings()
    few = 0
    packed: set[int] = set()
    for module in model.modules() if kind != "bfloat16" else ():
        if isinstance(module, torch.nn.Linear) and module is not head:
            packed.add(id(module.weight))
            count = module.weight.numel()
            # A byte each and a scale a row; or half of one, and a scale a block.
            few += (
                count + 4 * module.out_features
                if kind == "8bit"
                else count // 2 + 4 * (-(-count // _BLOCK))
            )
    rest = sum(p.numel() for p in model.parameters() if id(p) not in packed)
    return few + 2 * rest


def measured(name: str, kind: str) -> int:
    """Bytes of the tensors of a model that was built, saved and read in this form."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        models.empty(name).to(torch.bfloat16).save_pretrained(place)
        more = {} if kind == "bfloat16" else quantised.options(kind, torch.bfloat16, "cpu")
        import transformers

        factory = getattr(transformers, loading.FACTORIES["causal"])
        model = factory.from_pretrained(place, dtype=torch.bfloat16, **more)
    return held(model)


def held(model: Any) -> int:
    """Bytes of a model's weights and of the scales that belong to them."""
    total = 0
    for p in model.parameters():
        total += p.numel() * p.element_size()
        state = getattr(p, "quant_state", None)
        for scale in (getattr(state, "absmax", None), getattr(p, "SCB", None)):
            if scale is not None:
                total += scale.numel() * scale.element_size()
    return total


def main() -> None:
    """Measure, and write the rows."""
    about = machine.about()
    common = {k: about[k] for k in COLUMNS if k in about}
    rows = []
    for name in NAMES:
        for kind in KINDS:
            found = f"{measured(name, kind) / 2**20:.1f}" if name == MEASURED else ""
            size = f"{arithmetic(name, kind) / 2**20:.1f}"
            rows.append({**common, "model": name, "kind": kind, "mib": size, "measured_mib": found})
    results.write(RESULTS, COLUMNS, rows)


if __name__ == "__main__":
    sys.exit(main())
