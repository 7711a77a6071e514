"""`python -m lesslib.serving`; the code lies in `lesslib.bench.serving`."""

from lesslib.bench.serving import Load, main, parts, serve

__all__ = ["Load", "main", "parts", "serve"]

if __name__ == "__main__":
    main()
