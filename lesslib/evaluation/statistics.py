"""Comparisons of methods on the same texts or examples, with 95% bootstrap intervals."""

import numpy as np

INTERVAL = [0.025, 0.975]


def gap_closed(full: dict, baseline: dict, method: dict) -> tuple[float, float, float]:
    """The share of the gap in log perplexity between `baseline` and `full` that `method` closes.

    The three are results of `perplexity`. Returns the share and its 95% interval: a bootstrap over
    documents, the same of all three in a resample. Raises ValueError for results on different
    windows, or where the baseline loses nothing.
    """
    # [3, documents, (nll, tokens)]
    by_document = np.array([result["by_document"] for result in (full, baseline, method)])
    sums = by_document[..., 0]
    tokens = by_document[..., 1]
    if (tokens != tokens[0]).any():
        raise ValueError(
            "the three results were not measured on the same windows: compute them again together"
        )
    if sums[0].sum() == sums[1].sum():
        raise ValueError(
            "the baseline loses nothing to the full cache, so there is no gap to close: use a "
            "smaller budget"
        )
    documents = sums.shape[1]
    draws = np.random.default_rng(0).integers(0, documents, (2000, documents))
    # [3, 1 + 2000]: of the data, then of the resamples
    totals = np.concatenate([sums.sum(1)[:, None], sums[:, draws].sum(2)], 1)
    # a resample of short documents alone may have no gap
    has_gap = totals[0] != totals[1]
    full_nll, baseline_nll, method_nll = totals[:, has_gap]
    shares = (baseline_nll - method_nll) / (baseline_nll - full_nll)
    low, high = np.quantile(shares[1:], INTERVAL)
    return float(shares[0]), float(low), float(high)


def paired(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """mean(a) - mean(b) over the same examples, with a 95% interval of a paired bootstrap.

    Raises ValueError for unequal lengths.
    """
    if len(a) != len(b) or not a:
        raise ValueError(
            f"{len(a)} and {len(b)} examples cannot be paired: compute both on the same ones"
        )
    difference = np.subtract(a, b)
    draws = np.random.default_rng(0).integers(0, len(a), (4000, len(a)))
    low, high = np.quantile(difference[draws].mean(1), INTERVAL)
    return float(difference.mean()), float(low), float(high)
