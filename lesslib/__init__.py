"""LESS (Dong et al., ICML 2024): a low-rank state that keeps what a KV cache evicts.

    from lesslib import H2O, Lambda, TOVA, Full, LessCache, less

The names are loaded when first used, so that `python -m lesslib.run` answers without importing
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lesslib.attention.cache import LessCache
    from lesslib.hf import less
    from lesslib.policies import H2O, TOVA, Full, Lambda

__version__ = "0.1.0"
__all__ = ["H2O", "TOVA", "Full", "Lambda", "LessCache", "__version__", "less"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'lesslib' has no attribute {name!r}")
    return getattr(
        importlib.import_module(
            {"less": ".hf", "LessCache": ".attention.cache"}.get(name, ".policies"), __name__
        ),
        name,
    )
