"""Names that lie in `lesslib.evaluation.perplexity`, kept where users found them."""

from lesslib.evaluation.perplexity import Window, evaluation_windows, gap_closed, perplexity

__all__ = ["Window", "evaluation_windows", "gap_closed", "perplexity"]
