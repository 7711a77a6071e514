"""Models and kernels by name."""

from lesslib.attention.fit import cache_bytes, check_fit, model_shape
from lesslib.models.loading import carried_models, folder_of, kernel_path, load_kernels, load_model
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
