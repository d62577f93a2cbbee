"""Whether a run left its model worse than it was, told apart from noise.

Losses of single steps are noisy, and of a diverging run they span powers of ten. So they are
compared by their order: in how many pairs of a late and an early step the late one has the larger
loss. If nothing changed that is half of them, ± √((m + n + 1) / 12mn) for m and n steps (the
statistic of Mann and Whitney), whatever the losses' distribution.
"""

import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from zokernels.lab.runs.history import Mean
from zokernels.lab.tasks.metric import Metric

# Fewer steps tell nothing from noise.
FEWEST = 10
_RISE = 1.1


def rise(losses: Sequence[float]) -> tuple[float, float] | None:
    """The median loss of the first steps, and that of the last tenth, at least ten.

    None unless it rose above that of the first ten steps, or of the first tenth: by a tenth, and in
    more pairs of steps than half of them by three standard errors. Of 1,000 runs of mere noise two
    do.

    Args:
        losses: One a step; those that are not finite do not count.
    """
    finite = [x for x in losses if math.isfinite(x)]
    if len(finite) < 2 * FEWEST:
        return None
    tenth = max(FEWEST, len(finite) // 10)
    last = finite[-tenth:]
    # Ten, since a rate that is much too large shows at once; a tenth, to see through more noise.
    for first in (finite[:FEWEST], finite[:tenth]):
        pairs, early = len(first) * len(last), sorted(first)
        # Of equal losses, half.
        larger = sum(bisect_left(early, x) + bisect_right(early, x) for x in last) / (2 * pairs)
        error = math.sqrt((len(first) + len(last) + 1) / (12 * pairs))
        before, after = statistics.median(first), statistics.median(last)
        if larger > 0.5 + 3 * error and after > _RISE * before:
            return before, after
    return None


def worse(before: Mean | None, after: Mean | None, metric: Metric) -> bool:
    """Whether a metric is worse than before by two standard errors, or not finite any more."""
    if before is None or after is None:
        return False
    if not math.isfinite(after.value):
        return math.isfinite(before.value)
    error = math.hypot(before.error, after.error)
    return metric.better(before.value, after.value) and abs(before.value - after.value) > 2 * error


def sentence(
    losses: Sequence[float],
    before: Mean | None,
    after: Mean | None,
    metric: Metric,
    lr: float,
) -> str | None:
    """What a run that made its model worse says of it; None of any other run."""
    found = []
    if losses and not any(map(math.isfinite, losses)):
        found.append("no loss was finite")
    if rose := rise(losses):
        found.append(f"the loss rose from {rose[0]:.4g} in the first steps to {rose[1]:.4g}")
    if before and after and worse(before, after, metric):
        way = "fell" if metric.share else "rose"
        found.append(
            f"dev {metric.name} {way} from {metric.text(before.value)} to "
            f"{metric.text(after.value)}"
            if math.isfinite(after.value)
            else f"dev {metric.name} is not finite any more"
        )
    if not found:
        return None
    return (
        f"The run diverged: {' and '.join(found)}. Begin again with a lower learning rate, such as "
        f"--lr {lr / 10:.2g}; docs/recipes/which-optimizer.md has rates to begin with."
    )
