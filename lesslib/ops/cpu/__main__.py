"""`python -m lesslib.ops.cpu` compiles the kernels; the code lies in `prepare.py`."""

from lesslib.ops.cpu.prepare import main

main()
