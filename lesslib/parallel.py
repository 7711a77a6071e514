"""Names that lie in `lesslib.attention.whole_sequence`, kept where users found them."""

from lesslib.attention.whole_sequence import (
    Evicted,
    dense_attention,
    evict,
    less_attention,
    recover,
)

__all__ = ["Evicted", "dense_attention", "evict", "less_attention", "recover"]
