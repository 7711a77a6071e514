"""The only door to transformers' internals.

`with less(...)` puts our attention in a model's place, for any model on transformers' attention
interface. Open context.py first, then interface.py, what transformers calls; decode.py hands
layers of a LessCache to the attention modules, replace.py finds and changes these, falcon.py is
Falcon's own way. May import from attention, states, policies, ops and util.
"""

from lesslib.hf.context import less
from lesslib.hf.decode import fill
from lesslib.hf.interface import Attention
from lesslib.hf.replace import (
    attention_modules,
    capture,
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
