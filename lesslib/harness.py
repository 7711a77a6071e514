"""`python -m lesslib.harness`; the code lies in `lesslib.evaluation.harness`."""

from lesslib.evaluation.harness import LessLM, main

__all__ = ["LessLM", "main"]

if __name__ == "__main__":
    main()
