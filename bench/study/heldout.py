"""A data folder whose dev sentences are training sentences that are never trained on.

``python -m bench.study.heldout SST-2 OUT``: what a search for settings may look at. The sentences
are drawn by a fixed seed from those of the study's lengths.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

COUNT = 400
WORDS = range(3, 25)


def main(arguments: list[str] | None = None) -> int:
    """Writes OUT/train.tsv and OUT/dev.tsv, which must not be there yet."""
    parser = argparse.ArgumentParser(prog="python -m bench.study.heldout", description=__doc__)
    parser.add_argument("source", type=Path, help="folder with the task's train.tsv")
    parser.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    path = options.source / "train.tsv"
    if not path.exists():
        print(f"{path} is missing; name the folder that holds SST-2.", file=sys.stderr)
        return 2
    if options.out.exists() and any(options.out.iterdir()):
        print(f"{options.out} is not empty; name a folder to make.", file=sys.stderr)
        return 2
    head, *rows = path.read_text(encoding="utf-8").splitlines()
    fit = [i for i, row in enumerate(rows) if len(row.split("\t")[0].split()) in WORDS]
    held = set(random.Random(0).sample(fit, COUNT))
    options.out.mkdir(parents=True, exist_ok=True)
    for name, wanted in (("train", False), ("dev", True)):
        kept = [row for i, row in enumerate(rows) if (i in held) == wanted]
        (options.out / f"{name}.tsv").write_text("\n".join([head, *kept, ""]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
