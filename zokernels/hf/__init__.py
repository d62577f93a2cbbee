"""Zeroth-order optimizers inside ``transformers.Trainer``. Importing this imports transformers."""

from zokernels.hf.trainer import ZOTrainer, ZOTrainerMixin

__all__ = ["ZOTrainer", "ZOTrainerMixin"]
