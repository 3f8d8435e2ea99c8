"""`python -m moco.cli`: the command where only the interpreter can be named, such as under torchrun."""

import sys

from moco.cli import main

if __name__ == "__main__":
    sys.exit(main())
