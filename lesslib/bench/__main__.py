"""`python -m lesslib.bench`."""

from lesslib.bench.command import main

if __name__ == "__main__":
    main()
