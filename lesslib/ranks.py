"""Names that lie in `lesslib.util.ranks`, kept where users found them."""

from lesslib.util.ranks import gather, own_device, place

__all__ = ["gather", "own_device", "place"]
