"""``python -m r2m``: the same command as ``r2m``."""

import sys

from r2m.commands.main import main

sys.exit(main())
