"""``python -m zokernels``, as ``torchrun -m zokernels`` runs it: the command."""

from zokernels.lab.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
