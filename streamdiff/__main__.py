"""``python -m streamdiff``: the command line."""

import sys

from streamdiff.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
