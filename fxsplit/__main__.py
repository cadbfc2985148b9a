"""`python -m fxsplit` is the same as `fxsplit`."""

import sys

from fxsplit_cli.start import start

sys.exit(start())
