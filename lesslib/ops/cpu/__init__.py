"""The CPU form of LESS in Numba: one kernel, one job, with the names and signatures of ops/triton.

Every function does what a torch form elsewhere does, named in its docstring, with sums in float32
or wider; callers ask `dispatch.kernels_for` first, which imports this folder when first needed.
Open `decode.py` first, then `steps.py` and `products.py`, what its kernels are made of, and
`common.py` for threads.
Shapes: B batch, Hq query heads, Hkv key-value heads, G = Hq / Hkv, S tokens, N slots, D and Dv head
sizes of keys and values, R kernel size.
"""

from lesslib.ops.cpu.common import available
from lesslib.ops.cpu.decode import STEP_RULES, attend_step, decode_step
from lesslib.ops.cpu.features import phi, psi
from lesslib.ops.cpu.hidden_layer import mlp
from lesslib.ops.cpu.join import join
from lesslib.ops.cpu.low_rank import absorb, read
from lesslib.ops.cpu.prompt import weigh_rows
from lesslib.ops.cpu.sequence import SEQUENCE_RULES, sequence_of_steps

__all__ = [
    "SEQUENCE_RULES",
    "STEP_RULES",
    "absorb",
    "attend_step",
    "available",
    "decode_step",
    "join",
    "mlp",
    "phi",
    "psi",
    "read",
    "sequence_of_steps",
    "weigh_rows",
]
