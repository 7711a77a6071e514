"""`python -m lesslib.serving`; the code lies in `lesslib.bench.serving`."""

from lesslib.bench.serving import METHODS, PARTS, Clock, Load, main, parts, serve

__all__ = ["METHODS", "PARTS", "Clock", "Load", "main", "parts", "serve"]

if __name__ == "__main__":
    main()
