"""Models by name, and the kernels that were trained for them.

Import from here: `from lesslib.models import load_model, load_kernels`. `catalog` knows where
models lie and which weights they hold, `loading` loads one, `kernel_files` finds the kernels of
one. Open `loading.py` first.
"""

from lesslib.attention.fit import cache_bytes, check_fit, model_shape
from lesslib.models.catalog import carried_models, folder_of
from lesslib.models.kernel_files import kernel_path, load_kernels
from lesslib.models.loading import load_model
from lesslib.util.hardware import autocast, keep_memory
from lesslib.util.paths import ASSETS

__all__ = [
    "ASSETS",
    "autocast",
    "cache_bytes",
    "carried_models",
    "check_fit",
    "folder_of",
    "keep_memory",
    "kernel_path",
    "load_kernels",
    "load_model",
    "model_shape",
]
