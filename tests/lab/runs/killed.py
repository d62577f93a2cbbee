"""A process that starts runs and lets them die by SIGKILL, each in a fork of its own.

What takes seconds is loaded once. A line of JSON on stdin starts a run: its arguments, and the
point and count at which it is to kill itself, or null. The answers are its process's number when
it starts, and its exit status.
"""

import json
import os
import signal
import sys

from zokernels import ops
from zokernels.lab.cli import main
from zokernels.lab.runs import evaluate, folder, report
from zokernels.lab.runs.learner import Learner
from zokernels.lab.scoring import Scorer
from zokernels.optim.base import ZOOptimizer
from zokernels.trajectory import writer


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point, count):
    """Makes this process die at the count-th time that it comes to a point."""
    left = [count]

    def now():
        left[0] -= 1
        return left[0] < 0

    def before(owner, name):
        real = getattr(owner, name)
        setattr(owner, name, lambda *a, **k: die() if now() else real(*a, **k))

    def after(owner, name):
        real = getattr(owner, name)
        setattr(owner, name, lambda *a, **k: (real(*a, **k), die() if now() else None)[0])

    def half(fd, data):
        # The record's first bytes reach the file, the rest does not.
        if now():
            os.write(fd, bytes(data[: len(data) // 2]))
            die()
        write(fd, data)

    def replace(source, target):
        if str(target).endswith(folder.METRICS):
            die()
        rename(source, target)

    write, rename = writer._write, os.replace
    {
        # Before the first record.
        "begin": lambda: before(ZOOptimizer, "record"),
        # With the weights perturbed.
        "forward": lambda: before(Scorer, "losses"),
        # Written, and not yet recorded.
        "update": lambda: after(ops, "add_noise_"),
        "record": lambda: setattr(writer, "_write", half),
        # Recorded, and not yet in the log of metrics.
        "log": lambda: before(folder.RunFolder, "log"),
        "evaluation": lambda: before(evaluate, "accuracy"),
        # The weights are in a draft that has not taken its place; have taken it; all but the end.
        "saving": lambda: after(Learner, "save"),
        "saved": lambda: before(report, "plot"),
        "metrics": lambda: setattr(os, "replace", replace),
    }[point]()


def serve():
    """Answers line by line."""
    # What every run would load.
    import matplotlib.figure  # noqa: F401
    from transformers import AutoConfig, AutoModel, AutoTokenizer, BertModel  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1):
                os.dup2(null, fd)
            if order["point"]:
                arm(order["point"], order["count"])
            os._exit(main(order["argv"]))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
