"""One operation, several forms: none of them knows a policy's or a state's code.

naive.py is the spec, in plain loops; blocks.py and scan.py are the fast torch forms over a
sequence; merge.py joins partial softmaxes; slots.py and rules.py are what a fused step is given;
cpu/ and triton/ hold the kernels for CPUs and GPUs, and dispatch.py says which form runs:
`lesslib.ops.chosen(model, policy, state)`. Open naive.py first. May import from util alone.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: the runner looks at kernel_cache without torch.
    if name != "chosen":
        raise AttributeError(f"module 'lesslib.ops' has no attribute {name!r}")
    from lesslib.ops.dispatch import chosen

    return chosen
