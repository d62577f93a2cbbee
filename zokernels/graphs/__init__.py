"""A whole step as one CUDA graph: captured once, replayed with new numbers in device memory.

`numbers` is what the host writes before a replay and reads after it, `batch` the step's own copy of
a batch, `support` what can't be captured and why, and `step` the step itself.
"""

from zokernels.graphs.step import GraphedStep

__all__ = ["GraphedStep"]
