"""Names that lie in `lesslib.attention`, kept where users found them."""

from lesslib.attention.cache import LessCache
from lesslib.attention.fit import cache_bytes
from lesslib.attention.layer import LessLayer

__all__ = ["LessCache", "LessLayer", "cache_bytes"]
