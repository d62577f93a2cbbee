"""``python -m zokernels.lab.cli``."""

from zokernels.lab.cli import end

end()
