"""Numbers of a run before it: what decides its learning rate and ε, measured by forwards alone."""

from zokernels.probing.ladder import Rung
from zokernels.probing.measure import probe
from zokernels.probing.numbers import Number
from zokernels.probing.result import Part, Probe

__all__ = ["Number", "Part", "Probe", "Rung", "probe"]
