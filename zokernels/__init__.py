"""zokernels: fine-tune language models with forward passes only.

Public names only; importing touches no CUDA and no transformers.
"""

import warnings

with warnings.catch_warnings():
    # Where there is no numpy, importing torch says so, at every command; nothing here needs it.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
    import torch as _torch  # noqa: F401

from zokernels import masks, noise, ops
from zokernels.backends import backends
from zokernels.distributed import Distributed, RankError
from zokernels.graphs import GraphedStep
from zokernels.optim import (
    ZOSGD,
    ForwardGrad,
    HybridZO,
    ZOAdam,
    ZOSGDConservative,
    ZOSGDMomentum,
    ZOSGDSign,
)
from zokernels.optim.schedule import EpsSchedule
from zokernels.perturb import perturbed
from zokernels.probing import Probe, probe
from zokernels.trajectory import Trajectory, TrajectoryError, replay

__version__ = "0.1.0"

__all__ = [
    "Distributed",
    "EpsSchedule",
    "ForwardGrad",
    "GraphedStep",
    "HybridZO",
    "Probe",
    "RankError",
    "Trajectory",
    "TrajectoryError",
    "ZOSGD",
    "ZOAdam",
    "ZOSGDConservative",
    "ZOSGDMomentum",
    "ZOSGDSign",
    "backends",
    "masks",
    "noise",
    "ops",
    "perturbed",
    "probe",
    "replay",
]
