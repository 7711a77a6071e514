"""How good a model is under some attention: perplexity, answers to tasks, intervals of differences.

Import from this package (`from lesslib.evaluation import perplexity, gap_closed`); constants such
as POSITION_BIN lie in `perplexity.py`, which is the file to open first. `harness.py` plugs LESS
into lm-evaluation-harness and is imported by itself, since it needs that package.
"""

from lesslib.evaluation.answers import Decoding, continuations, option_scores, prompts
from lesslib.evaluation.perplexity import Window, evaluation_windows, perplexity
from lesslib.evaluation.rouge import rouge
from lesslib.evaluation.statistics import gap_closed, paired

__all__ = [
    "Decoding",
    "Window",
    "continuations",
    "evaluation_windows",
    "gap_closed",
    "option_scores",
    "paired",
    "perplexity",
    "prompts",
    "rouge",
]
