"""Storyworld: long English stories from a seeded world, with tasks that follow from them alone.

A world is a cast of people, for each one fact per relation (home, trade, possession, journey,
promise) or turn that a life takes or not (to keep one's word, to marry). A story tells each fact
once, in one of many sentence patterns, among scenes and deeds that no question asks about; some
facts come up again.

The tasks stand in for the paper's: `summary` (CNN/DailyMail), `sentence` (XSum), `tellings`
(MultiNews), `yes_no` (BoolQ; on turns, which fall like a coin), `reply` (MuTual; wrong ones are
true of others in the story): without the story all is chance.

Open `world.py` first, then `telling.py` (stories), `asking.py` (tasks), `lessons.py` (pretraining
texts). Every text is a function of its seed; recorded results rest on the order of random draws.
"""

from lesslib.data.storyworld.asking import KINDS, LEADS, Example, examples
from lesslib.data.storyworld.lessons import lessons
from lesslib.data.storyworld.telling import story
from lesslib.data.storyworld.words import HELDOUT, grammar, words
from lesslib.data.storyworld.world import TURNS, VALUES, Fact, World, new_world

__all__ = [
    "HELDOUT",
    "KINDS",
    "LEADS",
    "TURNS",
    "VALUES",
    "Example",
    "Fact",
    "World",
    "examples",
    "grammar",
    "lessons",
    "new_world",
    "story",
    "words",
]
