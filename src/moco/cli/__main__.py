"""`python -m moco.cli`: the command for launchers that take a Python module, such as torchrun."""

import sys

from moco.cli import main

if __name__ == "__main__":
    sys.exit(main())
