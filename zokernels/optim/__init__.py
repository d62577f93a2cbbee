"""One file a rule; `base` holds what all of them share."""

from zokernels.optim.sgd import ZOSGD

__all__ = ["ZOSGD"]
