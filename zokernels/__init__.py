"""zokernels: fine-tune language models with forward passes only.

Public names only; importing touches no CUDA and no transformers.
"""

from zokernels import masks, noise, ops
from zokernels.backends import backends

__version__ = "0.1.0"

__all__ = ["backends", "masks", "noise", "ops"]
