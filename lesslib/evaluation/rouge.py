"""ROUGE as a metric of Hugging Face's `evaluate`, which would otherwise download its script: `evaluate.load("path/to/this/file")`."""

import datasets
import evaluate
from rouge_score import rouge_scorer

TYPES = ("rouge1", "rouge2", "rougeL")


class Rouge(evaluate.Metric):
    """F-measure, in percent and by example, of words (rouge1), pairs of words (rouge2) and the longest common subsequence (rougeL).

    Words are stemmed, as in Lin (2004) and in the summarisation literature.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(
            description=str(self.__doc__), citation="Lin (2004)", features=features
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, list[float]]:
        scorer = rouge_scorer.RougeScorer(TYPES, use_stemmer=True)
        scores = [
            scorer.score(reference, said)
            for said, reference in zip(predictions, references, strict=True)
        ]
        return {name: [100 * s[name].fmeasure for s in scores] for name in TYPES}
