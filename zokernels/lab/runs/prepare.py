"""What a run works with, made by its settings; whatever can be refused is refused here."""

from collections.abc import Iterator
from typing import Any

import zokernels as zk
from zokernels.lab.errors import InputError
from zokernels.lab.models.loading import KINDS
from zokernels.lab.runs import checks, hand_over, learner, optimizers, tuning
from zokernels.lab.runs.settings import Settings
from zokernels.lab.runs.state import Run
from zokernels.lab.runs.trackers import Trackers
from zokernels.lab.scoring import SCORERS, Scorer
from zokernels.lab.scoring.probe import ProbeScorer
from zokernels.lab.tasks import chat, data
from zokernels.lab.tasks.batches import batches
from zokernels.lab.tasks.task import Example

_MAX_BAD_STEPS = 10
# Examples of which the length is looked at before a run.
_LOOKED_AT = 500
_OPTIMIZER_OPTIONS = (
    "lr eps num_queries estimator normalize clip dist sparsity resample_every blocks block_order "
    "rounding weight_decay seed perturb points backend hybrid_split fo_lr fo_optimizer".split()
)


def prepare(run: Run) -> Iterator[list[Example]]:
    """Fills in what the settings decide; nothing is written.

    Returns:
        The training examples in batches, without end.

    Raises:
        InputError: If the settings, the data or the model cannot be used, or ``lr`` is to be found
            and can't be told.
        RunError: If memory runs out in the probe for it, or its losses are not finite.
    """
    s = run.settings
    checks.check(s)
    run.trackers = Trackers(s, run.watcher, run.processes.first)
    hand_over.check(s)
    run.task = s.the_task()
    run.splits = data.load(run.task, s.data, s.eval_data, data.parsed(s.columns))
    if s.shots:
        run.splits = data.few(run.splits, s.shots, s.seed)
    run.pool = data.by_words(run.splits.train, s.min_words, s.max_words)
    classes = len(run.task.words) or 2
    order = batches(run.pool, s.batch_size, seed=s.seed, balanced=s.balanced, classes=classes)
    run.learner = learner.load(s, run.processes.shard)
    run.scorer = scorer(run)
    run.optimizer = optimizer_of(s, run.learner.model, run.processes.parallel)
    kind, trained = KINDS[run.learner.loaded.kind], run.learner.trained
    overview = (
        f"Data: {run.splits.source}, {len(run.pool):,} training {run.examples} and "
        f"{len(run.splits.dev):,} dev. Model: {s.title} as {kind}, "
        f"training {trained.weights:,} of {trained.of:,} weights."
    )
    notes = (*run.splits.notes, *run.learner.loaded.notes, *_cut(run), overview)
    for sentence in notes:
        run.watcher.say(sentence)
    if s.loses_updates and optimizers.key(s.optimizer) not in optimizers.FIRST_ORDER:
        run.watcher.say(
            f"{s.dtype} weights that round to nearest lose every update below half of their last "
            "place; --rounding stochastic keeps them on average."
        )
    if s.auto_lr and s.tuned is None and s.steps:
        tuning.choose(run)
        run.optimizer = optimizer_of(s, run.learner.model)
    return order


def _cut(run: Run) -> Iterator[str]:
    """Says of data of one's own how much of it is longer than the model gets to read."""
    if run.task.hub is not None or run.learner.loaded.kind != "causal":
        return
    some, scorer, most = data.part(run.pool, _LOOKED_AT), run.scorer, run.settings.max_length
    prompts = [scorer.prompt(e) for e in some]
    texts = [
        prompt + text
        for e, prompt in zip(some, prompts, strict=True)
        for text in scorer.candidates(e, prompt)
    ]
    # The last token is predicted, and not read.
    lengths = [len(ids) - 1 for ids in scorer.tokenizer(texts, verbose=False)["input_ids"]]
    if longer := sum(length > most for length in lengths):
        yield (
            f"{longer:,} of {len(texts):,} texts looked at are longer than --max-length {most} "
            f"tokens (the longest has {max(lengths):,}) and lose the start of their prompt."
        )


def scorer(run: Run) -> Scorer:
    """A run's way to score, by its settings, task, examples and model.

    Raises:
        InputError: If these do not fit each other.
    """
    s, loaded = run.settings, run.learner.loaded
    demos = data.part(run.splits.train, s.demos) if s.demos else []
    common = (
        run.learner.model, loaded.tokenizer, run.task, s.max_length, s.objective, demos,
        s.max_new_tokens,
    )  # fmt: skip
    if s.scheme == "probe":
        made: Scorer = ProbeScorer(*common, kind=loaded.kind)
    else:
        made = SCORERS[loaded.kind](*common)
    examples = (*run.splits.train, *run.splits.valid, *run.splits.dev)
    conversations = any(e.turns for e in examples)
    if s.chat or conversations:
        asked_by = "--chat" if s.chat else "Data of conversations"
        made.chat = chat.form(loaded.tokenizer, s.model, loaded.kind, asked_by)
    if conversations:
        # A template refuses roles that it does not know, and is to do so now.
        for example in examples:
            made.prompt(example)
    return made


def optimizer_of(s: Settings, model: Any, parallel: zk.Distributed | None = None) -> Any:
    """The optimizer that the settings name, over a model.

    Args:
        s: The settings.
        model: The model.
        parallel: How its steps are divided over processes.

    Raises:
        InputError: If it, or its backend, can't be had.
    """
    states = zk.backends()
    if s.backend is not None and s.backend not in states:
        raise InputError(f"--backend must be one of {', '.join(states)}, got '{s.backend}'.")
    if s.backend is not None and not states[s.backend].available:
        raise InputError(f"--backend {s.backend} is not there: {states[s.backend].reason}")
    options = {name: getattr(s, name) for name in _OPTIMIZER_OPTIONS}
    options |= {"max_bad_steps": _MAX_BAD_STEPS, "parallel": parallel}
    return optimizers.build(s.optimizer, model, options)
