"""The command `fxsplit`, which is also `python -m fxsplit`."""

import sys

from fxsplit_cli.start import start

sys.exit(start())
