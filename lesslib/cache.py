"""Names that lie in `lesslib.attention.cache`, kept where users found them."""

from lesslib.attention.cache import BUFFERS, LessCache, LessLayer
from lesslib.attention.fit import cache_bytes

__all__ = ["BUFFERS", "LessCache", "LessLayer", "cache_bytes"]
