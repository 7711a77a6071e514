"""Storyworld: long English stories from a seeded world, with summaries, yes/no questions and next utterances that follow from them alone.

A world is a cast of people, for each one fact per relation (home, trade, possession, journey, promise) or turn that a life takes or not
(to keep one's word, to marry). A story tells each fact once, in one of many sentence patterns, among scenes and deeds that no question asks
about; some facts come up again. Its tasks stand in for the paper's: `summary` (CNN/DailyMail), `sentence` (XSum), `tellings` (MultiNews),
`yes_no` (BoolQ; on turns, which fall like a coin), `reply` (MuTual; wrong ones are true of others in the story): without it all is chance.
Names, places, trades and things are a head and a tail, hundreds of each kind: closed lists of sixty would be learnt by heart.
"""

import functools
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

from lesslib.util.paths import ASSETS

PEOPLE = {
    "summary": (4, 3),
    "sentence": (3, 2),
    "tellings": (2, 2),
    "yes_no": (4, 2),
    "reply": (4, 4),
}  # in a story; in a shot
KINDS = tuple(PEOPLE)
HELDOUT, ECHO = (
    0.2,
    0.4,
)  # the share of every kind of words that no training story uses; the chance that a fact comes up again
TURNS = ("word", "return", "sick", "wed", "rich", "read")
VALUES = {
    "home": "places",
    "trade": "trades",
    "possession": "things",
    "journey": "places",
    "promise": "things",
}  # words by relation
PRONOUNS = {"he": "she", "his": "her", "him": "her", "man": "woman", "groom": "bride"}
LEADS = {
    "summary": "Summary:",
    "sentence": "In one sentence:",
    "tellings": "What all tellings say:",
}


@dataclass(frozen=True)
class Example:
    """One task: `text` to read, `lead` that asks, `options` (one reference for summaries), of which `options[right]` is true."""

    kind: str
    text: str
    lead: str
    options: tuple[str, ...]
    right: int = 0

    def shown(self, answer: bool = False, text: bool = True) -> str:
        """The example as a prompt; with its right `answer` as a shot; without its `text` to see what the question alone gives away."""
        asked = "\n".join(filter(None, (self.text if text else "", self.lead)))
        return asked + " " + self.options[self.right] if answer else asked


@dataclass(frozen=True)
class Fact:
    relation: str
    person: str
    value: str
    other: str = ""  # to whom a promise was made


@dataclass
class World:
    """People in the order of their appearance, each a man or not, and what is true of them by relation and person."""

    people: list[str]
    man: dict[str, bool]
    facts: dict[tuple[str, str], Fact]


@functools.cache
def grammar() -> dict:
    """Parts of words and sentence patterns (assets/storyworld.json)."""
    return json.loads((ASSETS / "storyworld.json").read_text())


@functools.cache
def words(kind: str, heldout: bool) -> dict[str, list[str]]:
    """By head, the names, places, trades or things that held-out stories use, or those that training stories use; no word is in both."""
    c = grammar()["compounds"][kind]
    made = {head + c["between"] + tail: head for head in c["heads"] for tail in c["tails"]}
    ranked = sorted(made, key=lambda w: hashlib.sha256(w.encode()).hexdigest())
    cut, by_head = round(len(ranked) * HELDOUT), dict[str, list[str]]()
    for word in ranked[:cut] if heldout else ranked[cut:]:
        by_head.setdefault(made[word], []).append(word)
    return by_head


def draw(rng: random.Random, kind: str, count: int, heldout: bool) -> list[str]:
    """`count` words of a kind, no two of one head."""
    by_head = words(kind, heldout)
    return [rng.choice(by_head[head]) for head in rng.sample(sorted(by_head), count)]


def new_world(rng: random.Random, people: int, relations: tuple[str, ...], heldout: bool) -> World:
    """A world of `people`, each with one fact per relation or turn; but for yes and no, no value is true of two of them."""
    names, endings = draw(rng, "names", people, heldout), tuple(grammar()["men_end_in"])
    world = World(names, {name: name.endswith(endings) for name in names}, {})
    drawn = {kind: draw(rng, kind, 2 * people, heldout) for kind in dict.fromkeys(VALUES.values())}
    circle = rng.sample(world.people, people)
    for relation in relations:
        for person in world.people:
            value = (
                rng.choice(("yes", "no")) if relation in TURNS else drawn[VALUES[relation]].pop()
            )
            other = circle[(circle.index(person) + 1) % people] if relation == "promise" else ""
            world.facts[relation, person] = Fact(relation, person, value, other)
    return world


def fill(pattern: str, rng: random.Random, world: World, fact: Fact) -> str:
    """A pattern with the words of `fact` and of chance."""
    slots = {name: rng.choice(options) for name, options in grammar()["slots"].items()}
    slots |= {man: man if world.man[fact.person] else woman for man, woman in PRONOUNS.items()}
    return pattern.format(p=fact.person, q=fact.other, v=fact.value, **slots)


def patterns(fact: Fact, again: bool = False) -> list[str]:
    """The sentences that tell a fact, or tell it again."""
    g = grammar()
    return (
        g["turns"][fact.relation][fact.value]
        if fact.relation in TURNS
        else g["relations"][fact.relation]["again" if again else "told"]
    )


def tell(rng: random.Random, world: World, facts: list[Fact], length: int) -> str:
    """The `facts` in order, each told once and some again later, among as many other sentences as make up `length` words."""
    g = grammar()
    told = [(i / max(1, len(facts)) * 0.6, rng.choice(patterns(f)), f) for i, f in enumerate(facts)]
    again = [
        (rng.uniform(0.65, 1), rng.choice(patterns(f, again=True)), f)
        for f in facts
        if rng.random() < ECHO
    ]
    placed = [(at, fill(pattern, rng, world, f)) for at, pattern, f in told + again]
    names, decks = ", ".join(world.people[:-1]) + " and " + world.people[-1], dict[str, list[str]]()
    placed.append((-1.0, rng.choice(g["openings"]).format(cast=names)))
    count = sum(len(s.split()) for _, s in placed)
    while count < length:
        kind = "deeds" if rng.random() < 0.3 else "scenes"
        deck = decks.setdefault(kind, [])
        deck += (
            [] if deck else rng.sample(g[kind], len(g[kind]))
        )  # none comes again before all have come
        sentence = fill(deck.pop(), rng, world, Fact("", rng.choice(world.people), ""))
        new_paragraph = kind == "scenes" and rng.random() < 0.3
        placed.append((rng.random(), "\n" * new_paragraph + sentence))
        count += len(sentence.split())
    return " ".join(s for _, s in sorted(placed)).replace(" \n", "\n")


def summary_of(world: World, kind: str) -> str:
    """The reference: three people in order of appearance, the first one's promise, or all that is true of the first."""

    def what(relation: str, person: str) -> str:
        return world.facts[relation, person].value

    hero, other = world.people[0], world.facts["promise", world.people[0]].other
    if kind == "summary":
        return " ".join(
            f"{p}, a {what('trade', p)} from {what('home', p)}, took the {what('possession', p)} to {what('journey', p)}."
            for p in world.people[:3]
        )
    if kind == "sentence":
        return f"{hero} of {what('home', hero)} promised {other} a {what('promise', hero)} and travelled to {what('journey', hero)}."
    return (
        f"{hero} lived in {what('home', hero)} and worked as a {what('trade', hero)}. {hero} owned a {what('possession', hero)} "
        f"and took it to {what('journey', hero)}. {hero} promised {other} a {what('promise', hero)}."
    )


def story(rng: random.Random, world: World, length: int, tellings: bool = False) -> str:
    """A story of about `length` words. `tellings`: three of them, each with some facts, every fact in one at least."""
    facts = rng.sample(list(world.facts.values()), len(world.facts))
    if not tellings:
        return tell(rng, world, facts, length)
    told_in = [{rng.randrange(3)} | {i for i in range(3) if rng.random() < 0.25} for _ in facts]
    parts = [
        (x, [f for f, where in zip(facts, told_in, strict=True) if i in where])
        for i, x in enumerate(("First", "Second", "Third"))
    ]
    return "\n".join(
        f"{ordinal} telling. {tell(rng, world, part, length // 3)}" for ordinal, part in parts
    )


def ask(
    rng: random.Random, world: World, text: str, kind: str, fact: Fact | None = None
) -> Example:
    """One task of `kind` about a told world (and a `fact`)."""
    if kind in LEADS:
        return Example(kind, text, LEADS[kind], (summary_of(world, kind),))
    fact = fact or rng.choice(
        [f for f in world.facts.values() if f.relation in (TURNS if kind == "yes_no" else VALUES)]
    )
    if kind == "yes_no":
        question = fill(rng.choice(grammar()["turns"][fact.relation]["ask"]), rng, world, fact)
        return Example(
            kind,
            text,
            f"Question: {question}\nAnswer:",
            ("yes", "no"),
            ("yes", "no").index(fact.value),
        )
    rivals = [f.value for f in world.facts.values() if f.relation == fact.relation and f != fact]
    speaker = fact.other or rng.choice([p for p in world.people if p != fact.person])
    question, answer = grammar()["relations"][fact.relation]["talk"]
    values = rng.sample([fact.value, *rng.sample(rivals, 3)], 4)
    lead = f'"{question.format(p=fact.person, q="me")}" asked {speaker}. {fact.person} answered:'
    replies = tuple(f'"{answer.format(v=v, q="you")}"' for v in values)
    return Example(kind, text, lead, replies, values.index(fact.value))


def examples(
    kind: str,
    count: int,
    seed: int = 0,
    length: int = 450,
    heldout: bool = True,
    small: bool = False,
) -> list[Example]:
    """`count` tasks of `kind`, each about a story of its own of about `length` words (4 words make some 7 tokens of pico-llama).

    `small`: the shortest stories that the kind allows, as shots of a prompt. Example `i` does not depend on `count`. Raises ValueError for
    an unknown kind, and for a length that cannot hold the facts.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of task {kind!r}: choose from {', '.join(KINDS)}")
    every, people = TURNS if kind == "yes_no" else tuple(VALUES), PEOPLE[kind][small]
    if small:
        length = 0
    elif length < (least := (12 if kind == "yes_no" else 16) * people * len(every)):
        raise ValueError(
            f"length is {length}, too short for the {people * len(every)} facts of a {kind} story: give {least} words or more"
        )
    found = []
    for i in range(count):
        rng = random.Random(f"{kind}/{seed}/{i}/{heldout}/{small}")
        world = new_world(
            rng, people, (rng.choice(every),) if small and kind not in LEADS else every, heldout
        )
        found.append(ask(rng, world, story(rng, world, length, kind == "tellings"), kind))
    return found


def questions(rng: random.Random, world: World, count: int) -> list[str]:
    """At most `count` questions with answers, none to be read off another's: plain, yes or no, next utterances if four people are there."""
    found = []
    for fact in rng.sample(list(world.facts.values()), min(count, len(world.facts))):
        if fact.relation in VALUES and (len(world.people) < 4 or rng.random() < 0.5):
            question, answer = (
                fill(p, rng, world, fact) for p in grammar()["relations"][fact.relation]["what"]
            )
            found.append(f"Question: {question}\nAnswer: {answer}")
        else:
            kind = "yes_no" if fact.relation in TURNS else "reply"
            found.append(ask(rng, world, "", kind, fact).shown(answer=True, text=False))
    return found


def drill(rng: random.Random, heldout: bool) -> str:
    """A few bare facts and many questions: where a model learns what a question asks for, long before it can follow a story."""
    people = rng.choice((1, 2, 2, 3, 4, 5))
    known = [
        r for r in (*VALUES, *TURNS) if people > 1 or r != "promise"
    ]  # none promises himself a thing
    world = new_world(rng, people, tuple(rng.sample(known, rng.choice((1, 1, 2, 3)))), heldout)
    told = [fill(rng.choice(patterns(f)), rng, world, f) for f in world.facts.values()]
    return "\n".join([" ".join(rng.sample(told, len(told))), *questions(rng, world, len(told))])


def lesson(rng: random.Random, heldout: bool) -> str:
    """A story, and several tasks on it."""
    people, tellings = rng.choice((2, 3, 4, 4, 5)), rng.random() < 0.2
    relations, turns = rng.choice(((5, 0), (5, 0), (5, 2), (2, 4), (1, 6), (1, 6)))
    world = new_world(
        rng, people, (*rng.sample(list(VALUES), relations), *rng.sample(TURNS, turns)), heldout
    )
    tasks = questions(rng, world, rng.randint(6, 12))
    if relations == len(VALUES):
        fit = ["tellings"] if tellings else ["sentence", "summary"] if people >= 3 else ["sentence"]
        tasks.insert(
            rng.randrange(len(tasks)),
            ask(rng, world, "", rng.choice(fit)).shown(answer=True, text=False),
        )
    return "\n".join(
        [
            story(rng, world, int(12 * len(world.facts) * rng.choice((1.1, 1.4, 1.8))), tellings),
            *tasks,
        ]
    )


def lessons(count: int, seed: int, heldout: bool = False) -> Iterator[str]:
    """`count` texts to pretrain on: sixteen drills, or one to three lessons as in a prompt of several shots."""
    for i in range(count):
        rng = random.Random(f"lesson/{seed}/{i}/{heldout}")
        form, times = (drill, 16) if rng.random() < 0.6 else (lesson, rng.choice((1, 1, 2, 3)))
        yield "\n\n".join(form(rng, heldout) for _ in range(times))
