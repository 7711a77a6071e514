"""What is remembered of who left.

A state is one file: a class under `@register_state` that says how evicted pairs are absorbed and
how a query reads them, as a partial softmax. Open base.py first, then low_rank.py, which is LESS;
kernels.py holds the trained weights of all layers and their files. May import from policies, ops
and util.
"""

from lesslib.states.base import Memory, ModelState, Nothing, State
from lesslib.states.kernels import FORMAT, Kernels
from lesslib.states.low_rank import SCALE_INIT, LayerKernels, LowRank
from lesslib.states.performer import LayerPerformer
from lesslib.states.registry import STATES, get_state, register_state

__all__ = [
    "FORMAT",
    "SCALE_INIT",
    "STATES",
    "Kernels",
    "LayerKernels",
    "LayerPerformer",
    "LowRank",
    "Memory",
    "ModelState",
    "Nothing",
    "State",
    "get_state",
    "register_state",
]
