"""``python -m zokernels.cli``."""

import sys

from zokernels.cli import main

sys.exit(main())
