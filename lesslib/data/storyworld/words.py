"""The words of storyworld: a head and a tail each, hundreds of each kind.

Closed lists of sixty would be learnt by heart. A share of every kind is held out: no training story
says those words.
"""

import functools
import hashlib
import json
import random

from lesslib.util.paths import ASSETS

# the share of every kind of words that no training story uses
HELDOUT = 0.2


@functools.cache
def grammar() -> dict:
    """Parts of words and sentence patterns (assets/storyworld.json)."""
    return json.loads((ASSETS / "storyworld.json").read_text())


@functools.cache
def words(kind: str, heldout: bool) -> dict[str, list[str]]:
    """By head, the names, places, trades or things of held-out stories, or of training stories.

    No word is in both.
    """
    compounds = grammar()["compounds"][kind]
    head_of: dict[str, str] = {}
    for head in compounds["heads"]:
        for tail in compounds["tails"]:
            head_of[head + compounds["between"] + tail] = head
    by_hash = sorted(head_of, key=lambda word: hashlib.sha256(word.encode()).hexdigest())
    heldout_count = round(len(by_hash) * HELDOUT)
    chosen = by_hash[:heldout_count] if heldout else by_hash[heldout_count:]
    by_head: dict[str, list[str]] = {}
    for word in chosen:
        by_head.setdefault(head_of[word], []).append(word)
    return by_head


def draw_words(rng: random.Random, kind: str, count: int, heldout: bool) -> list[str]:
    """`count` words of a kind, no two of one head."""
    by_head = words(kind, heldout)
    heads = rng.sample(sorted(by_head), count)
    return [rng.choice(by_head[head]) for head in heads]
