"""`python -m tailora.cli`: the same as `tailora`."""

import sys

from tailora.cli.main import main

sys.exit(main())
