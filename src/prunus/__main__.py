"""`python -m prunus`."""

import sys

from prunus.cli import main

sys.exit(main())
