"""The benchmark paper's settings by name: ``zo-bench/TASK/MODEL/SCHEME/OPTIMIZER``.

Grids of SST-2 on OPT-1.3B are those of the paper's public sweep files; for the other pairs of task
and model, the ranges that the paper states for a scheme. Source: Zhang et al., "Revisiting
Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning: A Benchmark", ICML 2024.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from zokernels.lab.errors import InputError
from zokernels.lab.runs.settings import AUTO

MODELS = {
    "roberta-large": "FacebookAI/roberta-large",
    "opt-1.3b": "facebook/opt-1.3b",
    "opt-13b": "facebook/opt-13b",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "vicuna-7b": "lmsys/vicuna-7b-v1.5",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
}
_LARGE = ("opt-13b", "llama-2-7b", "llama-2-13b", "vicuna-7b", "mistral-7b")
TASKS: dict[str, tuple[str, ...]] = {
    "sst2": ("roberta-large", "opt-1.3b", "opt-13b"),
    "copa": _LARGE,
    "winogrande": _LARGE,
    "multirc": ("opt-13b",),
}
SCHEMES = ("full", "lora", "prefix", "prompt")
OPTIMIZERS = (
    "zo-sgd", "zo-sgd-sign", "zo-sgd-mmt", "zo-sgd-cons", "zo-adam", "forward-grad",
    "fo-sgd", "fo-adam",
)  # fmt: skip
# The rate of a step that is divided by its own scale is in another unit than ZO-SGD's, so none of
# its grids is taken: what is not published is probed, by a tenth of a run's forwards.
_PROBED: dict[str, Any] = {"lr": AUTO, "probe_forwards": 4000}
# The three enhancements, which the paper adds to ZO-SGD on all weights; and newer methods on all
# weights, as docs/methods.md has them.
_ENHANCED: dict[str, dict[str, Any]] = {
    "zo-sgd-blocks": {"blocks": "layer"},
    "zo-sgd-sparse": {"sparsity": 0.2},
    "lozo": {"dist": "rank1"},
    # Number of directions, ε and rate of its public script.
    "fzoo": {
        "estimator": "one_sided",
        "normalize": "std",
        "num_queries": 8,
        "dist": "rademacher",
        "lr": 1e-5,
        "eps": 1e-3,
    },
    "meazo": {"normalize": "ema", **_PROBED},
    # The smallest population published; its members share their forwards.
    "eggroll": {
        "estimator": "population",
        "normalize": "std",
        "num_queries": 128,
        **_PROBED,
        "dist": "rank1",
        "perturb": "paired",
        "points": 16,
    },
    # The rate is half of ε.
    "es-at-scale": {
        "estimator": "population",
        "normalize": "std",
        "num_queries": 30,
        "eps": 1e-3,
        "lr": 5e-4,
    },
    # The deep part's learning rate is ours: of it nothing is published.
    "hybrid": {"hybrid_split": 8, "fo_lr": 1e-5, "fo_optimizer": "fo-adam"},
}
_COMMON: dict[str, Any] = {
    "steps": 20_000, "batch_size": 16, "schedule": "constant", "weight_decay": 0.0,
    "eval_every": 500, "eval_examples": 500, "whole_dev": True, "keep_best": True,
}  # fmt: skip
_OF_TASK: dict[str, dict[str, Any]] = {
    # 1,000 training examples.
    "sst2": {"shots": 500, "objective": "candidates"},
    "copa": {"objective": "tokens"},
    "winogrande": {"objective": "tokens"},
    "multirc": {"shots": 500, "objective": "tokens"},
}
# Theirs do not fit a card in float32; ours, since rounding to nearest loses small updates.
_OF_LARGE = {"dtype": "bfloat16", "rounding": "stochastic"}

Grid = tuple[float, ...]


def _tens(first: int, last: int) -> Grid:
    """10^-first down to 10^-last."""
    return tuple(float(f"1e-{n}") for n in range(first, last + 1))


# Scheme and optimizer: learning rates, scales of the perturbation.
_PUBLISHED: dict[tuple[str, str], tuple[Grid, Grid]] = {
    ("full", "zo-sgd"): (_tens(4, 8), _tens(3, 5)),
    ("full", "zo-sgd-sign"): ((1e-4, 1e-6, 1e-8), (1e-3, 1e-5)),
    ("full", "zo-sgd-mmt"): (_tens(5, 8), _tens(3, 5)),
    ("full", "zo-sgd-cons"): (_tens(5, 8), _tens(2, 4)),
    ("full", "zo-adam"): (_tens(4, 8), _tens(3, 5)),
    ("full", "forward-grad"): ((1e-5, 1e-6, 5e-7, 1e-7, 1e-8), ()),
    ("full", "fo-sgd"): (_tens(3, 7), ()),
    ("full", "fo-adam"): ((1e-2, 1e-4, 1e-6), ()),
    ("lora", "zo-sgd"): (_tens(3, 6), _tens(2, 4)),
    ("lora", "zo-sgd-sign"): (_tens(3, 6), _tens(2, 4)),
    ("lora", "zo-sgd-mmt"): (_tens(3, 6), _tens(2, 4)),
    ("lora", "zo-sgd-cons"): (_tens(4, 7), _tens(2, 4)),
    ("lora", "zo-adam"): (_tens(4, 6), _tens(2, 5)),
    ("lora", "forward-grad"): ((5e-5, 1e-5, 5e-6, 1e-6, 5e-7, 1e-7), ()),
    ("lora", "fo-sgd"): (_tens(2, 6), ()),
    ("lora", "fo-adam"): (_tens(2, 6), ()),
    ("prefix", "zo-sgd"): (_tens(2, 4), (1e-1,)),
    ("prefix", "zo-sgd-sign"): (_tens(2, 4), (1e-1,)),
    ("prefix", "zo-sgd-mmt"): (_tens(2, 4), (1e-1,)),
    ("prefix", "zo-sgd-cons"): (_tens(3, 6), _tens(2, 4)),
    ("prefix", "zo-adam"): (_tens(4, 8), _tens(3, 5)),
    ("prefix", "forward-grad"): ((5e-3, 1e-3, 5e-4), ()),
    # No file for it is published; that of Adam.
    ("prefix", "fo-sgd"): (_tens(2, 6), ()),
    ("prefix", "fo-adam"): (_tens(2, 6), ()),
    ("prompt", "zo-sgd"): (_tens(3, 6), _tens(2, 4)),
    ("prompt", "zo-sgd-sign"): ((1e-4, 1e-6, 1e-8), (1e-3, 1e-5)),
    ("prompt", "zo-sgd-mmt"): (_tens(3, 6), _tens(2, 4)),
    ("prompt", "zo-sgd-cons"): (_tens(4, 7), _tens(2, 4)),
    ("prompt", "zo-adam"): (_tens(4, 8), _tens(3, 5)),
    ("prompt", "forward-grad"): ((1e-2, 1e-3, 1e-4, 5e-5), ()),
    ("prompt", "fo-sgd"): (_tens(4, 8), ()),
    ("prompt", "fo-adam"): ((1e-2, 1e-4, 1e-6), ()),
}
# What those files mark as the best; of the other cells only the grid is published.
_BEST: dict[tuple[str, str], float] = {
    ("full", "forward-grad"): 5e-7,
    ("lora", "forward-grad"): 1e-5,
    ("prefix", "forward-grad"): 5e-4,
}
_RANGES: dict[str, tuple[Grid, Grid]] = {
    "full": (_tens(4, 8), _tens(2, 5)),
    "lora": (_tens(3, 7), _tens(2, 5)),
    "prefix": (_tens(2, 4), (1e-1,)),
    "prompt": (_tens(3, 6), _tens(2, 4)),
}


@dataclass(frozen=True)
class Preset:
    """A cell of the paper's tables.

    Attributes:
        name: Its name.
        settings: What a run of it is told, by the names of `Settings`; of the grids one point.
        grid: The points that the paper tried, for "lr" and, where there is one, "eps".
    """

    name: str
    settings: dict[str, Any]
    grid: dict[str, Grid]


def names() -> list[str]:
    """Every preset's name."""
    return [
        f"zo-bench/{task}/{model}/{scheme}/{optimizer}"
        for task, models in TASKS.items()
        for model in models
        for scheme in SCHEMES
        for optimizer in (*OPTIMIZERS, *(_ENHANCED if scheme == "full" else ()))
    ]


def get(name: str) -> Preset:
    """The preset called ``name``.

    The learning rate is the one that the paper's files mark as the best, else the middle of the
    grid (the smaller of two); ε is 1e-3, or the grid's only one.

    Raises:
        InputError: If there is none; the sentence has names like it.
    """
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, 3, 0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else "--preset list shows them."
        raise InputError(f"There is no preset '{name}'; {hint}")
    _, task, model, scheme, optimizer = name.split("/")
    rule = "zo-sgd" if optimizer in _ENHANCED else optimizer
    published = (task, model) == ("sst2", "opt-1.3b")
    rates, scales = _PUBLISHED[scheme, rule] if published else _RANGES[scheme]
    if not _PUBLISHED[scheme, rule][1]:
        scales = ()
    best = _BEST.get((scheme, optimizer)) if published else None
    settings = {
        "task": task,
        "model": MODELS[model],
        "scheme": scheme,
        "optimizer": "hybrid" if optimizer == "hybrid" else rule,
        **_COMMON,
        **_OF_TASK[task],
        **(_OF_LARGE if model in _LARGE else {}),
        # Grids fall.
        "lr": best or rates[len(rates) // 2],
    }
    if rule in ("fo-sgd", "fo-adam"):
        settings.pop("rounding", None)
    if scales:
        settings["eps"] = 1e-3 if 1e-3 in scales else scales[0]
    own = _ENHANCED.get(optimizer, {})
    grid = {"lr": rates, **({"eps": scales} if scales else {})}
    return Preset(name, settings | own, {k: v for k, v in grid.items() if k not in own})
