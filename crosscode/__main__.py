"""`python -m crosscode`: the command line."""

import sys

from crosscode.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
