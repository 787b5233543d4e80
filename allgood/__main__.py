"""`python -m allgood` is the command line."""

import sys

from allgood.cli import main

sys.exit(main())
