"""`python -m lesslib.run`; the code lies in `lesslib.runner.main`."""

import sys

from lesslib.runner.main import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
