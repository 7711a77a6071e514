"""Two methods compared beyond noise: differences with their intervals, in numbers and in words.

Answers and summaries are few, so a claim on them is decided only where the interval of a difference
leaves zero out, and only where the full cache itself does the task (`skilled`).
"""

from __future__ import annotations

from collections.abc import Sequence

from lesslib.evaluation import paired
from lesslib.experiments.claims import Verdict


def difference(a: Sequence[float], b: Sequence[float]) -> str:
    """mean(a) - mean(b) in words: with its paired 95% interval, and whether that holds zero."""
    mean, low, high = paired(list(a), list(b))
    words = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
    if low <= 0 <= high:
        return f"{words}, within noise"
    return words


def nats_apart(a: dict, b: dict) -> list[float]:
    """Nats a token that entry `a` loses beyond `b`, and a 95% interval over documents.

    Both entries were measured on the same windows.
    """
    losses_a = [nll for nll, _ in a["by_document"]]
    losses_b = [nll for nll, _ in b["by_document"]]
    # Of a mean over documents, to one over tokens.
    documents_a_token = len(losses_a) / a["tokens"]
    return [documents_a_token * end for end in paired(losses_a, losses_b)]


def skilled(*full: dict) -> bool:
    """Whether the full cache itself does a task, at each of its entries `full`.

    Otherwise no method can lose anything. It does where the 95% interval of its accuracy lies above
    the share of the commonest answer, or that of its ROUGE-1 above the ROUGE-1 of another text's
    reference.
    """
    return all(_is_above_chance(entry) for entry in full)


def _is_above_chance(entry: dict) -> bool:
    """Whether the 95% interval of an entry's scores lies above what is had by chance."""
    if "right" in entry:
        scores = entry["right"]
        chance = entry["majority"]
    else:
        scores = entry["scores"]["rouge1"]
        chance = entry["chance"]["rouge1"]
    _, low, _ = paired(scores, [chance] * len(scores))
    return low > 0


def ahead(
    claim: str, a: Sequence[float], b: Sequence[float], full: dict, more: str = ""
) -> Verdict:
    """The verdict on the `claim` that scores `a` are above `b` on average.

    Decided where the difference is beyond noise and the full cache, whose entry is `full`, does the
    task; `more` is said after the difference.
    """
    numbers = difference(a, b) + more
    if not skilled(full):
        return Verdict(claim, None, f"{numbers}; the full cache fails at the task")
    _, low, high = paired(list(a), list(b))
    is_noise = low <= 0 <= high
    return Verdict(claim, None if is_noise else low > 0, numbers)
