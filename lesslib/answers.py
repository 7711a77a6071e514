"""Names that lie in `lesslib.evaluation`, kept where users found them."""

from lesslib.evaluation import Decoding, continuations, option_scores, paired, prompts, rouge

__all__ = ["Decoding", "continuations", "option_scores", "paired", "prompts", "rouge"]
