"""``python -m zokernels.lab.cli``."""

import sys

from zokernels.lab.cli import main

sys.exit(main())
