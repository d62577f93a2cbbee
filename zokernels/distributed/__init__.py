"""Many processes, one run: agreement by scalars, and a comparison of what must be equal."""

from zokernels.distributed.exchange import RankError
from zokernels.distributed.processes import Distributed, connect, launched

__all__ = ["Distributed", "RankError", "connect", "launched"]
