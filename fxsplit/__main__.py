"""`python -m fxsplit` is the same as `fxsplit`."""

import sys

from fxsplit_cli.main import main

sys.exit(main())
