"""One side of a comparison, as a script: the passes of one package, timed by this folder's code.

``python side.py PACKAGE_ROOT PLAN`` prints each case's fastest repetition, over its floor's, and a
floor's own in nanoseconds a weight: other processes can only make a repetition longer. The package
may be of another commit, whose own benchmarks are absent or other than these; so both sides are
measured by the same code.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path


def main() -> None:
    """Measure and print."""
    root, plan = sys.argv[1:]
    # In place of this script's own folder, whose modules have common names.
    sys.path[0] = root
    import zokernels

    if not Path(zokernels.__file__).is_relative_to(root):
        sys.exit(f"zokernels was found in {zokernels.__file__} and not in {root}.")
    mine = types.ModuleType("zokernels.lab.benchmarks")
    mine.__path__ = [str(Path(__file__).parent)]
    sys.modules["zokernels.lab.benchmarks"] = mine
    from zokernels.lab.benchmarks import ops, passes

    options = json.loads(plan)
    options["dtypes"] = tuple(options["dtypes"])
    try:
        found = ops.measure(ops.Plan(**options))
    except passes.Unavailable as error:
        sys.exit(str(error))
    if found.interrupted:
        raise KeyboardInterrupt
    fastest = {case: min(taken) for case, taken in found.seconds.items()}
    floors = {case.floor: taken for case, taken in fastest.items() if case.name == passes.FLOOR}
    lines = []
    for case, taken in fastest.items():
        is_floor = case.name == passes.FLOOR
        value = taken / options["numel"] * 1e9 if is_floor else taken / floors[case.floor]
        lines.append(([case.dtype, case.op, case.dist, case.variant, case.name], value))
    print(json.dumps(lines))


if __name__ == "__main__":
    main()
