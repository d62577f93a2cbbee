"""The order in which a run sees its training sentences, fixed by its seed alone."""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

from zokernels.lab.errors import InputError
from zokernels.lab.tasks.task import Example


def batches(
    examples: Sequence[Example], size: int, *, seed: int, balanced: bool, classes: int = 2
) -> Iterator[list[Example]]:
    """Endless batches of ``size`` examples, drawn without replacement epoch by epoch.

    Args:
        examples: The pool.
        size: Examples in a batch.
        seed: Fixes the order.
        balanced: Give every class the same share of each batch; where ``size`` is not a multiple
            of the number of classes, the classes take turns at the rest.
        classes: Number of classes.

    Raises:
        InputError: If there are no examples, or none of a class that must be balanced.
    """
    if not examples:
        raise InputError("There is no training sentence left; widen --min-words and --max-words.")
    pools = _pools(examples, balanced)
    missing = set(range(classes)) - set(pools) if balanced else set()
    if missing:
        raise InputError(
            f"No training sentence has label {min(missing)}, so batches cannot be balanced; "
            "add some or pass --no-balanced."
        )
    source = random.Random(seed)
    streams = [_endless(pools[label], source) for label in sorted(pools)]
    return _mix(streams, size, source)


def independent(
    examples: Sequence[Example], size: int, *, seed: int, balanced: bool
) -> Iterator[list[Example]]:
    """Endless batches each of which is drawn apart from the others, for what measures their spread.

    Args:
        examples: The pool.
        size: Examples in a batch, drawn without replacement where there are as many.
        seed: Fixes the draws.
        balanced: Give every class the same share of each batch.
    """
    source, pools = random.Random(seed), _pools(examples, balanced)
    while True:
        streams = [_endless(pool, source, size) for pool in pools.values()]
        source.shuffle(streams)
        yield next(_mix(streams, size, source))


def _pools(examples: Sequence[Example], balanced: bool) -> dict[int, list[Example]]:
    """The examples by class, or all in one."""
    pools: dict[int, list[Example]] = defaultdict(list)
    for example in examples:
        pools[example.label if balanced else 0].append(example)
    return pools


def _endless(
    pool: list[Example], source: random.Random, most: int | None = None
) -> Iterator[Example]:
    """A pool's examples in one order after the other, of each order so many."""
    count = len(pool) if most is None else min(most, len(pool))
    while True:
        yield from source.sample(pool, count)


def _mix(
    streams: list[Iterator[Example]], size: int, source: random.Random
) -> Iterator[list[Example]]:
    turn = 0
    while True:
        batch = [next(streams[(turn + i) % len(streams)]) for i in range(size)]
        turn = (turn + size) % len(streams)
        source.shuffle(batch)
        yield batch
