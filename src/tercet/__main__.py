"""`python -m tercet`, for `torchrun -m tercet` and where the `tercet` script is not on the path."""

import sys

from tercet.cli import main

if __name__ == "__main__":
    sys.exit(main())
