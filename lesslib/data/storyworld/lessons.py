"""Texts to pretrain on: drills of bare facts, and stories with several tasks on them."""

import random
from collections.abc import Iterator

from lesslib.data.storyworld.asking import Example, reply_task, task_on, yes_no_task
from lesslib.data.storyworld.telling import fill, patterns, story
from lesslib.data.storyworld.words import grammar
from lesslib.data.storyworld.world import TURNS, VALUES, Fact, World, new_world


def lessons(count: int, seed: int, heldout: bool = False) -> Iterator[str]:
    """`count` texts: sixteen drills, or one to three lessons as in a prompt of several shots."""
    for i in range(count):
        rng = random.Random(f"lesson/{seed}/{i}/{heldout}")
        if rng.random() < 0.6:
            parts = [_drill(rng, heldout) for _ in range(16)]
        else:
            parts = [_lesson(rng, heldout) for _ in range(rng.choice((1, 1, 2, 3)))]
        yield "\n\n".join(parts)


def _drill(rng: random.Random, heldout: bool) -> str:
    """A few bare facts and many questions.

    A model learns there what a question asks for, long before it can follow a story.
    """
    people = rng.choice((1, 2, 2, 3, 4, 5))
    relations = [*VALUES, *TURNS]
    if people == 1:
        # nobody promises himself a thing
        relations.remove("promise")
    count = rng.choice((1, 1, 2, 3))
    world = new_world(rng, people, tuple(rng.sample(relations, count)), heldout)
    told = [fill(rng.choice(patterns(fact)), rng, world, fact) for fact in world.facts.values()]
    shuffled = " ".join(rng.sample(told, len(told)))
    return "\n".join([shuffled, *_questions(rng, world, len(told))])


def _lesson(rng: random.Random, heldout: bool) -> str:
    """A story, and several tasks on it."""
    people = rng.choice((2, 3, 4, 4, 5))
    tellings = rng.random() < 0.2
    relation_count, turn_count = rng.choice(((5, 0), (5, 0), (5, 2), (2, 4), (1, 6), (1, 6)))
    relations = rng.sample(list(VALUES), relation_count)
    turns = rng.sample(TURNS, turn_count)
    world = new_world(rng, people, (*relations, *turns), heldout)
    tasks = _questions(rng, world, rng.randint(6, 12))
    if relation_count == len(VALUES):
        place = rng.randrange(len(tasks))
        kind = rng.choice(_summaries_for(people, tellings))
        task = task_on(rng, world, "", kind)
        tasks.insert(place, _with_answer(task))
    length = int(12 * len(world.facts) * rng.choice((1.1, 1.4, 1.8)))
    return "\n".join([story(rng, world, length, tellings), *tasks])


def _summaries_for(people: int, tellings: bool) -> list[str]:
    """The kinds of summary that fit a story."""
    if tellings:
        return ["tellings"]
    if people >= 3:
        return ["sentence", "summary"]
    return ["sentence"]


def _questions(rng: random.Random, world: World, count: int) -> list[str]:
    """At most `count` questions with answers, none to be read off another's.

    They are plain, of yes or no, or next utterances where four people or more are there.
    """
    facts = list(world.facts.values())
    questions = []
    for fact in rng.sample(facts, min(count, len(facts))):
        if fact.relation in TURNS:
            questions.append(_with_answer(yes_no_task(rng, world, "", fact)))
        elif len(world.people) < 4 or rng.random() < 0.5:
            questions.append(_plain_question(rng, world, fact))
        else:
            questions.append(_with_answer(reply_task(rng, world, "", fact)))
    return questions


def _plain_question(rng: random.Random, world: World, fact: Fact) -> str:
    """A question for the value of a relation, with its answer."""
    ask, reply = grammar()["relations"][fact.relation]["what"]
    question = fill(ask, rng, world, fact)
    answer = fill(reply, rng, world, fact)
    return f"Question: {question}\nAnswer: {answer}"


def _with_answer(task: Example) -> str:
    """What a task asks, without its text, and the right answer."""
    return task.shown(answer=True, text=False)
