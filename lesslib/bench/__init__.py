"""Speed and memory: what training, decoding, scoring and serving cost, always beside a baseline.

Two commands print it: `python -m lesslib.bench train|decode|score|loads|peers` (command.py) and
`python -m lesslib.serving` (serving.py). Experiments import what they record from here. Open
timing.py first: the one clock and the device of all measurements; then decoding.py.
"""

from lesslib.bench.breakdown import PARTS, Clock, parts
from lesslib.bench.latency import serve
from lesslib.bench.load import Load
from lesslib.bench.served_model import METHODS
from lesslib.bench.shapes import MODELS
from lesslib.bench.stepwise import stepwise_attention
from lesslib.bench.timing import DEVICE, now
from lesslib.bench.training import SCHEMES, measure

__all__ = [
    "DEVICE",
    "METHODS",
    "MODELS",
    "PARTS",
    "SCHEMES",
    "Clock",
    "Load",
    "measure",
    "now",
    "parts",
    "serve",
    "stepwise_attention",
]
