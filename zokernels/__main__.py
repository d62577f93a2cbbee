"""``python -m zokernels``, as ``torchrun -m zokernels`` runs it: the command."""

from zokernels.lab.cli import end

if __name__ == "__main__":
    end()
