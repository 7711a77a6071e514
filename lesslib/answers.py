"""Names that lie in `lesslib.evaluation.answers`, kept where users found them."""

from lesslib.evaluation.answers import continuations, option_scores, paired, prompts, rouge

__all__ = ["continuations", "option_scores", "paired", "prompts", "rouge"]
