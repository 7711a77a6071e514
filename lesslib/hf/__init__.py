"""The only door to transformers' internals."""

from lesslib.hf.attention import (
    Attention,
    attention_modules,
    capture,
    fill,
    less,
    output_projection,
    replace_attention,
)

__all__ = [
    "Attention",
    "attention_modules",
    "capture",
    "fill",
    "less",
    "output_projection",
    "replace_attention",
]
