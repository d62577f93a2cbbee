"""What a sweep found, read from its table: the best cell of every scheme at equal forwards.

zokernels sweep examples/sweep.yaml --out runs/sweep
python examples/read_sweep.py runs/sweep
"""

import csv
import sys
from pathlib import Path


def main(folder: str = "runs/sweep") -> dict[str, str]:
    """Prints and returns the best optimizer of each scheme."""
    with (Path(folder) / "table.csv").open(newline="", encoding="utf-8") as file:
        cells = [row for row in csv.DictReader(file) if row["after"]]
    best = {}
    for cell in sorted(cells, key=lambda row: float(row["after"])):
        spread = f" ± {100 * float(cell['spread']):.1f}" if cell["spread"] else " (one seed)"
        passes = f"{float(cell['forwards']):.0f} forwards, {float(cell['backwards']):.0f} backwards"
        print(
            f"{cell['scheme']:8} {cell['optimizer']:10} {100 * float(cell['after']):.1f}%{spread}, "
            f"{passes}"
        )
        best[cell["scheme"]] = cell["optimizer"]
    return best


if __name__ == "__main__":
    main(*sys.argv[1:2])
