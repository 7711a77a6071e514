"""Stories: the facts of a world, told in sentence patterns among scenes and deeds."""

import random

from lesslib.data.storyworld.words import grammar
from lesslib.data.storyworld.world import TURNS, Fact, World

# the chance that a fact comes up again
ECHO = 0.4
# what a pattern calls a man, and what a woman
PRONOUNS = {"he": "she", "his": "her", "him": "her", "man": "woman", "groom": "bride"}

# where a sentence stands in a story (openings at -1, the others from 0 to 1), and its words
PlacedSentence = tuple[float, str]


def story(rng: random.Random, world: World, length: int, tellings: bool = False) -> str:
    """A story of about `length` words.

    `tellings`: three of them, each with some facts, every fact in one at least.
    """
    facts = rng.sample(list(world.facts.values()), len(world.facts))
    if tellings:
        return _three_tellings(rng, world, facts, length)
    return _tell(rng, world, facts, length)


def _three_tellings(rng: random.Random, world: World, facts: list[Fact], length: int) -> str:
    """Three stories that make up `length` words, each with its part of the facts."""
    ordinals = ("First", "Second", "Third")
    parts: list[list[Fact]] = [[], [], []]
    for fact in facts:
        certain = rng.randrange(3)
        for i, part in enumerate(parts):
            is_told_too = rng.random() < 0.25
            if is_told_too or i == certain:
                part.append(fact)
    texts = []
    for ordinal, part in zip(ordinals, parts, strict=True):
        texts.append(f"{ordinal} telling. {_tell(rng, world, part, length // 3)}")
    return "\n".join(texts)


def _tell(rng: random.Random, world: World, facts: list[Fact], length: int) -> str:
    """The `facts` in order, each told once and some again later, in `length` words.

    As many other sentences as that takes stand among them.
    """
    sentences = _told_facts(rng, world, facts)
    sentences.append((-1.0, _opening(rng, world)))
    count = sum(len(sentence.split()) for _, sentence in sentences)
    sentences += _other_sentences(rng, world, length - count)
    in_order = [sentence for _, sentence in sorted(sentences)]
    # a sentence that begins a paragraph brings its line break
    return " ".join(in_order).replace(" \n", "\n")


def _told_facts(rng: random.Random, world: World, facts: list[Fact]) -> list[PlacedSentence]:
    """Every fact once, in the first part of the story, and some again in the last."""
    chosen: list[tuple[float, str, Fact]] = []
    for i, fact in enumerate(facts):
        place = i / max(1, len(facts)) * 0.6
        chosen.append((place, rng.choice(patterns(fact)), fact))
    for fact in facts:
        if rng.random() < ECHO:
            place = rng.uniform(0.65, 1)
            chosen.append((place, rng.choice(_patterns_again(fact)), fact))
    return [(place, fill(pattern, rng, world, fact)) for place, pattern, fact in chosen]


def _opening(rng: random.Random, world: World) -> str:
    """The first sentence, which names everybody."""
    cast = ", ".join(world.people[:-1]) + " and " + world.people[-1]
    return rng.choice(grammar()["openings"]).format(cast=cast)


def _other_sentences(rng: random.Random, world: World, count: int) -> list[PlacedSentence]:
    """Deeds and scenes anywhere in the story, until they make up `count` words."""
    # what has not come yet, by kind: no sentence comes again before all have come
    decks: dict[str, list[str]] = {"deeds": [], "scenes": []}
    sentences: list[PlacedSentence] = []
    while count > 0:
        kind = "deeds" if rng.random() < 0.3 else "scenes"
        deck = decks[kind]
        if not deck:
            deck += rng.sample(grammar()[kind], len(grammar()[kind]))
        pattern = deck.pop()
        nobodys_fact = Fact("", rng.choice(world.people), "")
        sentence = fill(pattern, rng, world, nobodys_fact)
        count -= len(sentence.split())
        begins_paragraph = kind == "scenes" and rng.random() < 0.3
        if begins_paragraph:
            sentence = "\n" + sentence
        sentences.append((rng.random(), sentence))
    return sentences


def patterns(fact: Fact) -> list[str]:
    """The sentences that tell a fact."""
    if fact.relation in TURNS:
        return grammar()["turns"][fact.relation][fact.value]
    return grammar()["relations"][fact.relation]["told"]


def _patterns_again(fact: Fact) -> list[str]:
    """The sentences that tell a fact again; a turn has no others."""
    if fact.relation in TURNS:
        return patterns(fact)
    return grammar()["relations"][fact.relation]["again"]


def fill(pattern: str, rng: random.Random, world: World, fact: Fact) -> str:
    """A pattern with the words of `fact` and of chance."""
    slots = {name: rng.choice(options) for name, options in grammar()["slots"].items()}
    for man, woman in PRONOUNS.items():
        slots[man] = man if world.man[fact.person] else woman
    return pattern.format(p=fact.person, q=fact.other, v=fact.value, **slots)
