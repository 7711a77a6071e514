"""ROUGE of texts, by Google's `rouge_score`."""

TYPES = ("rouge1", "rouge2", "rougeL")


def rouge(texts: list[str], references: list[str]) -> dict[str, list[float]]:
    """F-measure in percent, by type and example, of `texts` against one reference each.

    Of words (rouge1), pairs of words (rouge2) and the longest common subsequence (rougeL). Words
    are stemmed, as in Lin (2004) and in the summarisation literature.
    """
    # not at the top: rouge_score is needed by the notebooks' tasks alone
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(TYPES, use_stemmer=True)
    by_type: dict[str, list[float]] = {name: [] for name in TYPES}
    for text, reference in zip(texts, references, strict=True):
        for name, score in scorer.score(reference, text).items():
            by_type[name].append(round(100 * score.fmeasure, 3))
    return by_type
