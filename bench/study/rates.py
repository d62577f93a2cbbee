"""One step's gain by learning rate, on training batches alone: ``python -m bench.study.rates``.

For a model and a scheme: some batches, a direction each, its slope d, and the loss of the same
batch at θ − ηdz (ZO-SGD) and at θ − η sign(d)z with z of signs (ZO-SGD-Sign), for many η. To second
order the mean of the change is −η‖g‖² + η²‖g‖² tr(H)/2, which is least at η = 1/tr(H). The rates of
`bench/study/matrix.yaml` come from here; no held-out and no reported example is seen.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import zokernels as zk
from zokernels.lab.benchmarks import results
from zokernels.lab.models.loading import quiet
from zokernels.lab.runs import learner
from zokernels.lab.runs.settings import Settings
from zokernels.lab.scoring import SCORERS
from zokernels.lab.tasks import batches, data, get_task

COLUMNS = ("model", "scheme", "trained_weights", "rule", "eps", "lr", "gain", "error", "slope_rms")
RATES = {
    "full": (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4),
    "bitfit": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "lora": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "prefix": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "prompt": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
}
EPS = {"full": 1e-3, "bitfit": 1e-3, "lora": 1e-2, "prefix": 1e-2, "prompt": 1e-2}


@torch.no_grad()
def measure(settings: Settings, directions: int) -> list[dict]:
    """A row for each rule and rate: the mean gain of a step."""
    made = learner.load(settings)
    scorer = SCORERS[made.loaded.kind](
        made.model, made.loaded.tokenizer, get_task("sst2"), settings.max_length
    )
    splits = data.load(get_task("sst2"), settings.data)
    pool = data.by_words(splits.train, settings.min_words, settings.max_words)
    order = batches.batches(pool, settings.batch_size, seed=settings.seed, balanced=False)
    eps, rates = EPS[settings.scheme], RATES[settings.scheme]
    gains: dict[tuple[str, float], list[float]] = {}
    slopes: dict[str, list[float]] = {"zo-sgd": [], "zo-sgd-sign": []}
    for k in range(directions):
        batch = scorer.collate(next(order))

        def loss(scale: float, dist: str, seed: int = k, batch: dict = batch) -> float:
            with zk.perturbed(made.model, seed, scale, dist=dist):
                return float(scorer.loss(batch))

        start = float(scorer.loss(batch))
        for rule, dist in (("zo-sgd", "gaussian"), ("zo-sgd-sign", "rademacher")):
            slope = (loss(eps, dist) - loss(-eps, dist)) / (2 * eps)
            slopes[rule].append(slope)
            way = slope if rule == "zo-sgd" else (1.0 if slope > 0 else -1.0)
            for lr in rates:
                gains.setdefault((rule, lr), []).append(start - loss(-lr * way, dist))
    found = []
    for (rule, lr), values in gains.items():
        t, d = torch.tensor(values), torch.tensor(slopes[rule])
        found.append(
            {
                "model": settings.title,
                "scheme": settings.scheme,
                "trained_weights": made.trained.weights,
                "rule": rule,
                "eps": eps,
                "lr": lr,
                "gain": f"{t.mean():.3g}",
                "error": f"{t.std() / len(t) ** 0.5:.2g}",
                "slope_rms": f"{d.square().mean().sqrt():.3g}",
            }
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure and write, for each model and scheme."""
    parser = argparse.ArgumentParser(prog="python -m bench.study.rates", description=__doc__)
    parser.add_argument("--model", action="append", required=True, help="NAME=FOLDER:SCHEME,…")
    parser.add_argument("--directions", type=int, default=16)
    parser.add_argument("--max-words", type=int, default=8)
    options = parser.parse_args(arguments)
    quiet()
    rows: list[dict] = []
    for given in options.model:
        name, _, rest = given.partition("=")
        folder, _, schemes = rest.rpartition(":")
        for scheme in schemes.split(","):
            settings = Settings(
                folder, Path("unused"), name=name, scheme=scheme, seed=100, batch_size=16,
                max_length=48, min_words=3, max_words=options.max_words,
            )  # fmt: skip
            rows += measure(settings, options.directions)
            for row in rows[-2 * len(RATES[scheme]) :]:
                print(*row.values(), flush=True)
    results.write(results.FOLDER / "rates.csv", COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
