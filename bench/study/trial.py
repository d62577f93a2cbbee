"""A model with examples to train on and some held out, for one training run after another."""

from __future__ import annotations

import copy
import random
import time
from pathlib import Path
from typing import Any

import torch

from zokernels.estimators import forwards_of
from zokernels.lab.runs import learner, optimizers
from zokernels.lab.runs.prepare import optimizer_of
from zokernels.lab.runs.settings import Settings
from zokernels.lab.scoring import SCORERS
from zokernels.lab.tasks import batches, data, get_task

HELD_OUT, PART = 400, 50


class Trial:
    """What runs with the same settings, but for rate, seed and steps, have in common.

    Args:
        settings: Of the runs; the scheme decays linearly.
        source: Folder with the task's data.

    Attributes:
        by_backward: Whether it goes by backpropagation.
        forwards: What a step costs, a backward counting as two.
    """

    def __init__(self, settings: Settings, source: Path):
        s = self.settings = settings
        s.schedule = "linear"
        self.made = learner.load(s)
        self.start = copy.deepcopy(self.made.model.state_dict())
        loaded, task = self.made.loaded, get_task(s.task)
        self.scorer = SCORERS[loaded.kind](self.made.model, loaded.tokenizer, task, s.max_length)
        self.splits = data.load(task, str(source))
        pool = data.by_words(self.splits.train, s.min_words, s.max_words)
        held = set(random.Random(0).sample(range(len(pool)), HELD_OUT))
        self.pool = [x for i, x in enumerate(pool) if i not in held]
        chosen = [pool[i] for i in sorted(held)]
        self.held_out = [
            self.scorer.collate(chosen[i : i + PART]) for i in range(0, HELD_OUT, PART)
        ]
        self.by_backward = optimizers.key(s.optimizer) in optimizers.FIRST_ORDER
        self.forwards = 3 if self.by_backward else forwards_of(s.estimator, s.num_queries)

    @property
    def described(self) -> dict[str, Any]:
        """The settings as rows have them; empty where they mean nothing."""
        s = self.settings
        own = {
            "dist": s.dist, "estimator": s.estimator, "queries": s.num_queries,
            "normalize": s.normalize or "", "eps": s.eps,
        }  # fmt: skip
        return {
            "model": s.title, "task": s.task, "scheme": s.scheme, "train_only": s.train_only or "",
            "optimizer": s.optimizer,
            **(dict.fromkeys(own, "") if self.by_backward else own),
        }  # fmt: skip

    @torch.no_grad()
    def losses(self) -> torch.Tensor:
        """Of the held-out examples, at the weights as they are."""
        return torch.cat([self.scorer.losses(batch) for batch in self.held_out])

    def begin(self) -> None:
        """The weights are those of the model as it was published."""
        self.made.model.load_state_dict(self.start)

    def train(self, lr: float, seed: int, forwards: int) -> float:
        """One run of so many forwards, from the weights as they are; gives its seconds."""
        s = self.settings
        s.lr, s.seed, s.steps = lr, seed, forwards // self.forwards
        opt = optimizer_of(s, self.made.model)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, s.factor)
        order = batches.batches(self.pool, s.batch_size, seed=seed, balanced=False)
        started = time.perf_counter()
        for _ in range(s.steps):
            batch = self.scorer.collate(next(order))
            opt.step(lambda batch=batch: self.scorer.loss(batch))
            schedule.step()
        return time.perf_counter() - started
