"""`python -m graphwright`: the toolbox."""

import sys

from graphwright.cli import main

sys.exit(main())
