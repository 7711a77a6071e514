"""Have the CPU kernels compiled once, before processes start that would each do so."""

from __future__ import annotations

import os
import subprocess
import sys

from lesslib.ops import kernel_cache
from lesslib.util.paths import ROOT

# What notebooks compute in; tests compare in float64 too.
OF_NOTEBOOKS = ("float32",)
OF_TESTS = ("float32", "float64")


def prepare_kernels(dtypes: tuple[str, ...], variables: dict[str, str]) -> None:
    """Compile the kernels for models in `dtypes`, unless they are, or will not be used.

    `variables` are the environment. In a process of its own: this one loads no torch.
    """
    if os.environ.get("LESS_OPS") in ("torch", "triton") or not kernel_cache.has_numba():
        return
    if kernel_cache.is_complete(dtypes):
        return
    # Where it fails, what needs the kernels says so.
    command = [sys.executable, "-m", "lesslib.ops.cpu", *dtypes]
    subprocess.run(command, cwd=ROOT, env=variables, check=False)
