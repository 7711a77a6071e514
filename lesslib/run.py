"""`python -m lesslib.run`; the code lies in `lesslib.runner.run`."""

import sys

from lesslib.runner.run import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
