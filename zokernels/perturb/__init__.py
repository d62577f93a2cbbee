"""The perturbed forward: the model at θ + scale · z, with the stored weights safe.

`OnEntry` makes perturbed weights in scratch as operations ask for them, so that memory grows by
the largest layer only; `Paired` does so for several points in one forward, `together` for the rows
of a batch, each at its own point, and `CarryingTangents` gives weights a tangent so. `InPlace`
writes the weights themselves, from a copy. None ever adds and then subtracts: what was stored comes
back bit for bit.
"""

from zokernels.perturb.context import perturbed
from zokernels.perturb.deferred import DeferredDirection
from zokernels.perturb.direction import Direction, Move
from zokernels.perturb.in_place import InPlace
from zokernels.perturb.members import together
from zokernels.perturb.modes import MODES, choose_mode, is_compiled
from zokernels.perturb.on_entry import OnEntry
from zokernels.perturb.paired import Paired
from zokernels.perturb.randomness import RandomState
from zokernels.perturb.rows import Rows, is_plain_list
from zokernels.perturb.tangents import CarryingTangents, directions
from zokernels.perturb.weight import Misused

__all__ = [
    "MODES", "CarryingTangents", "DeferredDirection", "Direction", "InPlace", "Misused", "Move",
    "OnEntry", "Paired", "RandomState", "Rows", "choose_mode", "directions", "is_compiled",
    "is_plain_list", "perturbed", "together",
]  # fmt: skip
