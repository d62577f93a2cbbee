"""A run's log of scalars: recorded a step at a time, replayed bit for bit.

`format` says what the bytes are, `writer` appends them, `reader` reads them, `recorder` turns an
optimizer's passes into records, and `playback` runs the passes again.
"""

from zokernels.trajectory.format import TrajectoryError
from zokernels.trajectory.playback import match, play, replay
from zokernels.trajectory.reader import Trajectory
from zokernels.trajectory.recorder import Recorder

__all__ = ["Recorder", "Trajectory", "TrajectoryError", "match", "play", "replay"]
