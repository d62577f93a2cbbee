"""The passes as Triton kernels, for CUDA tensors; and, interpreted, for tensors on the CPU.

noise.py, arithmetic.py and rules.py are device functions, values in and values out; group.py is
what the kernels of add_noise.py and update.py share; table.py and launch.py are the host's side.
shift.py is of a perturbed product.
"""

from zokernels.backends.triton.add_noise import add_noise, prepare_add_noise
from zokernels.backends.triton.arithmetic import INTERPRETED
from zokernels.backends.triton.shift import shift
from zokernels.backends.triton.update import apply_update, prepare_apply_update
from zokernels.noise import GAUSSIAN, RADEMACHER, RANK1

# The distributions that they draw.
KINDS = (GAUSSIAN, RADEMACHER, RANK1)

__all__ = [
    "KINDS",
    "INTERPRETED",
    "add_noise",
    "apply_update",
    "prepare_add_noise",
    "prepare_apply_update",
    "shift",
]
