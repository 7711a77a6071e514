"""A world of storyworld: a cast of people, and what is true of each of them."""

import random
from dataclasses import dataclass

from lesslib.data.storyworld.words import draw_words, grammar

# relations that have a word as their value, and the kind of that word
VALUES = {
    "home": "places",
    "trade": "trades",
    "possession": "things",
    "journey": "places",
    "promise": "things",
}
# relations that are "yes" or "no" of a person
TURNS = ("word", "return", "sick", "wed", "rich", "read")


@dataclass(frozen=True)
class Fact:
    """What is true of a person in one relation or turn."""

    relation: str
    person: str
    value: str
    # to whom a promise was made
    other: str = ""


@dataclass
class World:
    """People in the order of their appearance, and what is true of them."""

    people: list[str]
    # whether a person is a man
    man: dict[str, bool]
    # by relation and person
    facts: dict[tuple[str, str], Fact]


def new_world(rng: random.Random, people: int, relations: tuple[str, ...], heldout: bool) -> World:
    """A world of `people`, each with one fact per relation or turn.

    But for yes and no, no value is true of two of them.
    """
    names = draw_words(rng, "names", people, heldout)
    ends_of_men = tuple(grammar()["men_end_in"])
    world = World(names, {name: name.endswith(ends_of_men) for name in names}, {})
    # two relations take their values from the places, two from the things
    unused: dict[str, list[str]] = {}
    for kind in dict.fromkeys(VALUES.values()):
        unused[kind] = draw_words(rng, kind, 2 * people, heldout)
    # everybody promises something to the next in the circle
    circle = rng.sample(world.people, people)
    for relation in relations:
        for person in world.people:
            if relation in TURNS:
                value = rng.choice(("yes", "no"))
            else:
                value = unused[VALUES[relation]].pop()
            other = ""
            if relation == "promise":
                other = circle[(circle.index(person) + 1) % people]
            world.facts[relation, person] = Fact(relation, person, value, other)
    return world
