"""`python -m lesslib.pretrain`; the code lies in `lesslib.zoo.pretrain`."""

from lesslib.zoo.pretrain import Settings, main, pretrain

__all__ = ["Settings", "main", "pretrain"]

if __name__ == "__main__":
    main()
