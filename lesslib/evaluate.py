"""Names that lie in `lesslib.evaluation`, kept where users found them."""

from lesslib.evaluation import Window, evaluation_windows, gap_closed, perplexity

__all__ = ["Window", "evaluation_windows", "gap_closed", "perplexity"]
