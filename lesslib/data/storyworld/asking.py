"""Tasks on a story: summaries, questions of yes or no, next utterances."""

import random
from dataclasses import dataclass

from lesslib.data.storyworld.telling import fill, story
from lesslib.data.storyworld.words import grammar
from lesslib.data.storyworld.world import TURNS, VALUES, Fact, World, new_world

# what asks for each kind of summary
LEADS = {
    "summary": "Summary:",
    "sentence": "In one sentence:",
    "tellings": "What all tellings say:",
}


@dataclass(frozen=True)
class Cast:
    """How many people a story of some kind has, and how many the small one of a shot."""

    story: int
    shot: int


CASTS = {
    "summary": Cast(story=4, shot=3),
    "sentence": Cast(story=3, shot=2),
    "tellings": Cast(story=2, shot=2),
    "yes_no": Cast(story=4, shot=2),
    "reply": Cast(story=4, shot=4),
}
KINDS = tuple(CASTS)


@dataclass(frozen=True)
class Example:
    """One task: `text` to read, `lead` that asks, `options`, of which `options[right]` is true.

    A summary has one option, the reference.
    """

    kind: str
    text: str
    lead: str
    options: tuple[str, ...]
    right: int = 0

    def shown(self, answer: bool = False, text: bool = True) -> str:
        """The example as a prompt; with its right `answer` as a shot.

        Without its `text` it shows what the question alone gives away.
        """
        parts = [self.text, self.lead] if text else [self.lead]
        prompt = "\n".join(part for part in parts if part)
        if answer:
            return prompt + " " + self.options[self.right]
        return prompt


def examples(
    kind: str,
    count: int,
    seed: int = 0,
    length: int = 450,
    heldout: bool = True,
    small: bool = False,
) -> list[Example]:
    """`count` tasks of `kind`, each about a story of its own.

    A story has about `length` words (4 words make some 7 tokens of pico-llama); `small` makes the
    shortest that the kind allows, as shots of a prompt. Example `i` does not depend on `count`.

    Raises ValueError for an unknown kind, and for a length that cannot hold the facts.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of task {kind!r}: choose from {', '.join(KINDS)}")
    relations = TURNS if kind == "yes_no" else tuple(VALUES)
    people = CASTS[kind].shot if small else CASTS[kind].story
    if small:
        length = 0
    else:
        _check_length(kind, length, people * len(relations))
    tasks = []
    for i in range(count):
        rng = random.Random(f"{kind}/{seed}/{i}/{heldout}/{small}")
        told = relations
        if small and kind not in LEADS:
            # one question needs one relation only
            told = (rng.choice(relations),)
        world = new_world(rng, people, told, heldout)
        text = story(rng, world, length, tellings=kind == "tellings")
        tasks.append(task_on(rng, world, text, kind))
    return tasks


def _check_length(kind: str, length: int, facts: int) -> None:
    """Raises ValueError when a story of `length` words cannot hold so many `facts`."""
    words_a_fact = 12 if kind == "yes_no" else 16
    least = words_a_fact * facts
    if length < least:
        raise ValueError(
            f"length is {length}, too short for the {facts} facts of a {kind} story: give {least} "
            "words or more"
        )


def task_on(rng: random.Random, world: World, text: str, kind: str) -> Example:
    """One task of `kind` about a world that `text` tells, on a fact of chance."""
    if kind in LEADS:
        return summary_task(world, text, kind)
    relations = TURNS if kind == "yes_no" else VALUES
    fact = rng.choice([fact for fact in world.facts.values() if fact.relation in relations])
    if kind == "yes_no":
        return yes_no_task(rng, world, text, fact)
    return reply_task(rng, world, text, fact)


def yes_no_task(rng: random.Random, world: World, text: str, fact: Fact) -> Example:
    """Whether a turn was taken."""
    pattern = rng.choice(grammar()["turns"][fact.relation]["ask"])
    question = fill(pattern, rng, world, fact)
    options = ("yes", "no")
    lead = f"Question: {question}\nAnswer:"
    return Example("yes_no", text, lead, options, options.index(fact.value))


def reply_task(rng: random.Random, world: World, text: str, fact: Fact) -> Example:
    """What a person answers to another; the wrong replies are true of others."""
    rivals = []
    for other_fact in world.facts.values():
        if other_fact.relation == fact.relation and other_fact != fact:
            rivals.append(other_fact.value)
    speaker = fact.other
    if not speaker:
        speaker = rng.choice([person for person in world.people if person != fact.person])
    question, answer = grammar()["relations"][fact.relation]["talk"]
    values = rng.sample([fact.value, *rng.sample(rivals, 3)], 4)
    spoken = question.format(p=fact.person, q="me")
    lead = f'"{spoken}" asked {speaker}. {fact.person} answered:'
    replies = []
    for value in values:
        replies.append(f'"{answer.format(v=value, q="you")}"')
    return Example("reply", text, lead, tuple(replies), values.index(fact.value))


def summary_task(world: World, text: str, kind: str) -> Example:
    """A summary of one of the kinds in LEADS."""
    if kind == "summary":
        reference = _summary_of_three(world)
    elif kind == "sentence":
        reference = _summary_in_a_sentence(world)
    else:
        reference = _summary_of_tellings(world)
    return Example(kind, text, LEADS[kind], (reference,))


def _values_of(world: World, person: str) -> dict[str, str]:
    """By relation, what is true of a person, and `other`, to whom the promise was made."""
    values = {relation: world.facts[relation, person].value for relation in VALUES}
    return {**values, "other": world.facts["promise", person].other}


def _summary_of_three(world: World) -> str:
    """The reference of `summary`: three people in order of appearance."""
    pattern = "{p}, a {trade} from {home}, took the {possession} to {journey}."
    three = world.people[:3]
    return " ".join(pattern.format(p=person, **_values_of(world, person)) for person in three)


def _summary_in_a_sentence(world: World) -> str:
    """The reference of `sentence`: the first person's promise and journey."""
    hero = world.people[0]
    pattern = "{p} of {home} promised {other} a {promise} and travelled to {journey}."
    return pattern.format(p=hero, **_values_of(world, hero))


def _summary_of_tellings(world: World) -> str:
    """The reference of `tellings`: all that is true of the first person."""
    hero = world.people[0]
    pattern = (
        "{p} lived in {home} and worked as a {trade}. {p} owned a {possession} and took it to "
        "{journey}. {p} promised {other} a {promise}."
    )
    return pattern.format(p=hero, **_values_of(world, hero))
