"""`python -m lesslib.train`; the code lies in `lesslib.training`."""

from lesslib.training import (
    LayerData,
    LayerTrainer,
    Recipe,
    capture_layers,
    captured_bytes,
    features,
    layer_pool,
    main,
    train,
    train_for_profile,
)

__all__ = [
    "LayerData",
    "LayerTrainer",
    "Recipe",
    "capture_layers",
    "captured_bytes",
    "features",
    "layer_pool",
    "main",
    "train",
    "train_for_profile",
]

if __name__ == "__main__":
    main()
