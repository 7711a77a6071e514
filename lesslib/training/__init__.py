"""Training of the kernels of LESS, layer by layer (paper, section 3.2).

Import from here: `from lesslib.training import Recipe, train`. `recipe` holds the settings,
`capture` what training learns from, `layer` the training of one layer with its loss; `all_layers`
trains a model, by a `share` of the layers for each rank, and `parts` that keep finished ones;
`command` is `python -m lesslib.train`. Open `layer.py` first.
"""

from lesslib.training.all_layers import train, train_for_profile
from lesslib.training.capture import LayerData, capture_layers, captured_bytes
from lesslib.training.command import main
from lesslib.training.layer import LayerTrainer, features
from lesslib.training.recipe import Recipe
from lesslib.training.share import layer_pool

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
