"""``python -m r2m``: the same command as ``r2m``."""

import sys

from r2m.cli import main

sys.exit(main())
