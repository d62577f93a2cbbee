"""zokernels: fine-tune language models with forward passes only.

Public names only; importing touches no CUDA and no transformers.
"""

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
