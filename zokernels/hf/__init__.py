"""Zeroth-order optimizers inside ``transformers.Trainer``. Importing this imports transformers."""

try:
    from zokernels.hf.trainer import ZOTrainer, ZOTrainerMixin
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    sentence = "zokernels.hf needs transformers: pip install '.[hf]'."
    raise ModuleNotFoundError(sentence, name=error.name) from None

__all__ = ["ZOTrainer", "ZOTrainerMixin"]
