"""`python -m parley.conformance URL`."""

import sys

from parley.conformance.command import main

sys.exit(main(sys.argv[1:]))
