"""One operation, several forms: none of them knows a policy's or a state's code.

naive.py is the spec, in plain loops; blocks.py and scan.py are the fast torch forms over a
sequence; merge.py joins partial softmaxes; slots.py and rules.py are what a fused step is given;
triton/ holds the GPU kernels, and dispatch.py says which form runs. Open naive.py first. May
import from util alone.
"""
