"""One file a rule; `base` holds what all of them share."""

from zokernels.optim.adam import ZOAdam
from zokernels.optim.conservative import ZOSGDConservative
from zokernels.optim.forward_grad import ForwardGrad
from zokernels.optim.hybrid import HybridZO
from zokernels.optim.momentum import ZOSGDMomentum
from zokernels.optim.sgd import ZOSGD
from zokernels.optim.sign import ZOSGDSign

__all__ = [
    "ZOSGD",
    "ZOAdam",
    "ZOSGDConservative",
    "ZOSGDMomentum",
    "ZOSGDSign",
    "ForwardGrad",
    "HybridZO",
]
