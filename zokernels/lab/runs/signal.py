"""What the slopes of a run say: would more directions, more examples or another rate help?

Each step measures how much of its slopes' square is ‖g‖² and how much comes from which examples
are in the batch (`zokernels.optim.signal`). By ‖g‖² plain ZO-SGD with a rate η should lower the
loss by η ‖g‖² a step; curvature takes its part of that, all of it at the largest stable rate. So
the share of that fall which the run has really made tells how near its rate is to that one:
fall = η ‖g‖² · (1 − η / η_max).
"""

import math
import statistics
from collections.abc import Sequence

from zokernels.lab.runs import optimizers
from zokernels.lab.runs.history import History, brief, with_error
from zokernels.lab.runs.settings import Settings

# Of fewer steps a mean says nothing.
FEWEST = 20


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def sentences(history: History, s: Settings) -> list[str]:
    """What a run's report says of its signal; nothing where its steps had none."""
    told = history.signals
    if len(told) < FEWEST:
        return []
    gradient, error = mean_and_error([t["gradient"] for t in told])
    noise, _ = mean_and_error([t["noise"] for t in told])
    found = [
        f"The slopes of single batches have a mean square of {brief(gradient + noise)}: "
        f"{brief(noise)} comes from which {told[0]['examples']} examples are in a batch, and what "
        f"is left, {with_error(gradient, error)}, is ‖g‖², the squared gradient (means "
        f"over {len(told):,} steps)."
    ]
    if gradient < 2 * error:
        members = "" if s.estimator == "population" else ", `--estimator population`"
        found.append(
            "That is no gradient that stands out of its error: either the model has learned what "
            "it can at this rate, or its steps were by chance. More directions a step "
            f"(`--num-queries`{members}) or more examples (`--batch-size`) tell more; fewer "
            "weights (`--scheme lora`, `--train-only`) have less noise."
        )
        return found
    if noise > gradient:
        found.append(
            f"{noise / (gradient + noise):.0%} of it is by chance of the examples, so a larger "
            "batch helps as much as more directions for the same forwards."
        )
    else:
        found.append(
            f"Only {noise / (gradient + noise):.0%} of it is by chance of the examples: more "
            "directions help, a larger batch hardly."
        )
    return found + _of_the_rate(history, s, gradient)


def _of_the_rate(history: History, s: Settings, gradient: float) -> list[str]:
    """What the fall of the loss says of the rate, where the rule is plain and the fall is clear."""
    if optimizers.key(s.optimizer) != "zosgd" or s.normalize or s.clip or s.blocks:
        return []
    losses = [x for x in history.losses if math.isfinite(x)]
    tenth = len(losses) // 10
    if tenth < FEWEST:
        return []
    (first, one), (last, other) = mean_and_error(losses[:tenth]), mean_and_error(losses[-tenth:])
    # From the middle of the first tenth to the middle of the last.
    rates = history.rates[tenth // 2 : -(tenth // 2)]
    expected, fall, error = sum(rates) * gradient, first - last, math.hypot(one, other)
    text = (
        f"At this rate ‖g‖² stands for a fall of the loss by {brief(expected)}; it fell by "
        f"{with_error(fall, error)}"
    )
    if expected < 2 * error:
        return [
            f"{text}, from which nothing can be said of the rate: a larger `--lr`, or more steps, "
            "would tell."
        ]
    if s.loses_updates and fall < expected:
        return [
            f"{text}. {s.dtype} weights that round to nearest lose small updates, as curvature "
            "takes its part of large ones, so nothing can be said of the rate; "
            "`--rounding stochastic` loses none."
        ]
    if fall + 2 * error < expected / 4:
        return [f"{text}: curvature takes most of it, so a smaller `--lr` would help."]
    if fall - 2 * error > expected * 3 / 4:
        return [f"{text}: curvature takes little of it, so a larger `--lr` may help."]
    return [f"{text}, as near the best rate."]
