"""The GPU form of LESS in Triton: one kernel, one job.

Every function does what a torch form elsewhere does, named in its docstring, with sums in float32;
callers ask `available` first. Open `decode.py` first, then `steps.py`, what its kernels are made
of. Shapes: B batch, Hq query heads, Hkv key-value heads, G = Hq / Hkv, S tokens, N slots, D and Dv
head sizes of keys and values, R kernel size.
"""

from lesslib.ops.triton.common import INTERPRETED, available
from lesslib.ops.triton.decode import AttendResult, StepResult, attend_step, decode_step
from lesslib.ops.triton.features import phi, psi
from lesslib.ops.triton.low_rank import absorb, read
from lesslib.ops.triton.prompt import column_sums, row_logsumexp
from lesslib.ops.triton.scan import lowrank_attention, lowrank_attention_by_position
from lesslib.ops.triton.sequence import sequence_of_steps
from lesslib.ops.triton.steps import RULES

# The rules that `decode_step` and `sequence_of_steps` know.
STEP_RULES = RULES
SEQUENCE_RULES = RULES

__all__ = [
    "INTERPRETED",
    "SEQUENCE_RULES",
    "STEP_RULES",
    "AttendResult",
    "StepResult",
    "absorb",
    "attend_step",
    "available",
    "column_sums",
    "decode_step",
    "lowrank_attention",
    "lowrank_attention_by_position",
    "phi",
    "psi",
    "read",
    "row_logsumexp",
    "sequence_of_steps",
]
