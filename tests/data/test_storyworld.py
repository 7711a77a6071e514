"""Storyworld: held-out words, and answers that follow from the text alone.

Nothing else gives them away.
"""

import itertools
import json
import random
import re
from collections import Counter

import pytest

from lesslib.data.storyworld import (
    HELDOUT,
    KINDS,
    LEADS,
    TURNS,
    VALUES,
    Example,
    examples,
    grammar,
    lessons,
    new_world,
    story,
    words,
)
from lesslib.data.tasks import load_task


def patterns_of_facts():
    """The sentences that tell the value of a relation."""
    patterns = []
    for relation in grammar()["relations"].values():
        patterns += relation["told"] + relation["again"]
    return patterns


def patterns_of_no_fact():
    return grammar()["deeds"] + grammar()["scenes"]


def test_there_are_more_than_sixty_sentence_patterns():
    patterns = patterns_of_facts() + grammar()["openings"] + patterns_of_no_fact()
    turns = []
    for turn in grammar()["turns"].values():
        turns += turn["yes"] + turn["no"]
    assert len(set(patterns + turns)) == len(patterns) + len(turns)
    assert len(patterns) >= 60
    assert len(turns) >= 60


def test_articles_fit_the_words_that_follow_them():
    texts = list(lessons(150, seed=2))
    for kind in KINDS:
        texts += [e.shown(answer=True) for e in examples(kind, 20)]
    said = "\n".join(texts)
    after = {article: set(re.findall(rf"\b{article} (\w)", said, re.I)) for article in ("a", "an")}
    assert len(after["a"]) > 15
    assert not after["a"] & set("aeiou")
    assert after["an"] <= set("aeiouh")


def every(kind, heldout):
    return set(itertools.chain(*words(kind, heldout).values()))


@pytest.mark.parametrize("kind", ["names", "places", "trades", "things"])
def test_words_are_for_training_or_held_out(kind):
    compounds = grammar()["compounds"][kind]
    train = every(kind, heldout=False)
    held = every(kind, heldout=True)
    assert len(held) == round((len(train) + len(held)) * HELDOUT) > 50
    assert not train & held
    pairs = itertools.product(compounds["heads"], compounds["tails"])
    assert train | held == {head + compounds["between"] + tail for head, tail in pairs}


def test_lessons_say_no_word_that_is_held_out():
    said = "\n".join(lessons(60, seed=0))
    for kind in ("names", "places", "trades", "things"):
        both = every(kind, False) | every(kind, True)
        met = {word for word in both if says(said, word)}
        assert met
        assert not met & every(kind, True)


def test_no_two_words_of_a_world_share_their_head():
    for i in range(50):
        world = new_world(random.Random(i), 5, tuple(grammar()["relations"]), heldout=i % 2 == 0)
        for relations, kind in (
            (("home", "journey"), "places"),
            (("possession", "promise"), "things"),
            (("trade",), "trades"),
        ):
            values = [fact.value for fact in world.facts.values() if fact.relation in relations]
            heads = []
            for value, (head, made) in itertools.product(values, words(kind, i % 2 == 0).items()):
                if value in made:
                    heads.append(head)
            assert len(values) == len(set(heads)) == 5 * len(relations)


@pytest.mark.parametrize("kind", KINDS)
def test_examples_are_seeded_and_do_not_depend_on_their_count(kind):
    few = examples(kind, 2, seed=3)
    assert few == examples(kind, 5, seed=3)[:2]
    assert few[0] != few[1]
    assert few[0] != examples(kind, 1, seed=4)[0]


def test_a_story_tells_every_fact_and_its_length_is_as_asked():
    for i in range(20):
        rng = random.Random(i)
        world = new_world(rng, 3, (*VALUES, "wed", "read"), heldout=True)
        text = story(rng, world, 450, tellings=i % 2 == 1)
        sentences = re.split(r"(?<=[.?!])\s", text)
        for fact in world.facts.values():
            if fact.relation in TURNS:
                assert said_of(
                    fact.person, grammar()["turns"][fact.relation][fact.value], sentences
                ), (fact, text)
            else:
                assert any(
                    fact.person in s and fact.value in s and fact.other in s for s in sentences
                ), (fact, text)
        assert 440 <= len(text.split()) <= 640
    assert 2200 <= len(examples("summary", 1, length=2300)[0].text.split()) <= 2400


def is_true(question, told, heldout):
    """Whether a sentence of `told` says all the names and the value of the `question`."""
    names = [word for word in every("names", heldout) if says(question, word)]
    kinds = ("places", "trades", "things")
    values = itertools.chain(*(every(kind, heldout) for kind in kinds))
    (value,) = (word for word in values if says(question, word))
    assert names
    return any(says_all(sentence, (value, *names)) for sentence in told)


def says(text, word):
    """Whether the word stands in the text by itself."""
    # Where it stands at all: `find` is a hundred times as fast as an expression.
    begin = text.find(word)
    return begin >= 0 and re.compile(rf"\b{word}\b").search(text, begin) is not None


def says_all(sentence, words_said):
    return all(says(sentence, word) for word in words_said)


def said_of(name, patterns, told):
    """Whether one of the sentences `told` is one of `patterns`, of the person called `name`."""
    for pattern in patterns:
        with_name = re.sub(r"\\\{p\\\}", name, re.escape(pattern))
        with_any_words = re.sub(r"\\\{\w+\\\}", r"\\w+", with_name)
        if any(re.fullmatch(with_any_words, sentence) for sentence in told):
            return True
    return False


def answer_of(question, told, heldout):
    """What the sentences `told` say to a question of yes or no.

    Of all turns and people, it is the one that the `question` asks about.
    """
    answers = set()
    for turn in grammar()["turns"].values():
        for name in every("names", heldout):
            if name in question and said_of(name, turn["ask"], [question]):
                answers |= {answer for answer in ("yes", "no") if said_of(name, turn[answer], told)}
    (answer,) = answers
    return answer


def test_yes_and_no_answers_are_true():
    for e in examples("yes_no", 60):
        told = re.split(r"(?<=[.?!])\s", e.text)
        assert e.options[e.right] == answer_of(
            re.search(r"Question: (.*)", e.lead)[1], told, True
        ), e


def test_answers_in_lessons_are_true():
    seen = Counter()
    openings = tuple(opening.split("{")[0] for opening in grammar()["openings"])
    for text in lessons(25, seed=1):
        for part in text.split("\n\n"):
            told = re.split(
                r"(?<=[.?!\n])\s*",
                re.split(r'\nQuestion: |\n"|\nSummary:|\nIn one|\nWhat all', part)[0],
            )
            told = [s for s in told if not s.startswith(openings)]
            for question, answer in re.findall(r"Question: ([^\n]*)\nAnswer: ([^\n]*)", part):
                if answer in ("yes", "no"):
                    assert answer == answer_of(question, told, False), (question, answer, part)
                else:
                    assert is_true(f"{question} {answer}", told, False), (question, answer, part)
                seen[answer if answer in ("yes", "no") else "plain"] += 1
    assert min(seen.values()) > 100


def test_the_two_sides_of_a_turn_are_told_apart_by_their_sentences_alone():
    turns = grammar()["turns"]
    assert set(turns) == set(TURNS)
    told = []
    for turn in turns.values():
        told += turn["yes"] + turn["no"]
    assert len(told) == len(set(told))
    assert all("{p}" in sentence for sentence in told)
    assert all(len(turn["yes"]) == len(turn["no"]) for turn in turns.values())


def test_nothing_told_of_a_person_settles_a_turn_but_its_own_sentences():
    """No pattern of another fact, deed or scene has words that would answer a turn's question."""
    others = patterns_of_facts() + patterns_of_no_fact()
    words_of = (
        r"\b(kept {his} word|came home|went home|sick|ill|fever|marr\w+|wedding|bride|rich|poor"
        r"|fortune|coins?|wrote|read)\b"
    )
    assert not [p for p in others if re.search(words_of, p)]


def test_wrong_replies_are_true_of_others_in_the_same_story():
    for e in examples("reply", 40):
        assert len(set(e.options)) == 4
        values = [
            re.sub(r'^"(I live in|I am a|I carry the|I travelled to|I promised you a) |\."$', "", o)
            for o in e.options
        ]
        assert all(v in e.text for v in values), values


def test_nothing_but_the_text_gives_the_answer_away():
    yes_no = examples("yes_no", 2000, length=320)
    reply = examples("reply", 1000, length=320)
    assert abs(sum(e.right == 0 for e in yes_no) / 2000 - 0.5) < 0.04
    for guess in (
        lambda o: 0,
        lambda o: o.index(max(o, key=len)),
        lambda o: o.index(min(o, key=len)),
        lambda o: o.index(min(o)),
    ):
        assert 0.2 < sum(guess(e.options) == e.right for e in reply) / 1000 < 0.3


@pytest.mark.parametrize("kind", LEADS)
def test_what_a_summary_says_stands_in_the_text(kind):
    for e in examples(kind, 10):
        reference = e.options[0]
        names = set(re.findall(r"\b[A-Z][a-z]+", reference))
        assert len(names) >= 3
        assert all(n in e.text for n in names)
        assert e.shown(answer=True) == f"{e.text}\n{LEADS[kind]} {reference}"


def test_an_example_without_a_lead_is_its_text():
    assert Example("reply", "m : hi", "", ("a",)).shown() == "m : hi"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: examples("riddle", 1),
            "unknown kind of task 'riddle': choose from summary, sentence",
        ),
        (
            lambda: examples("summary", 1, length=100),
            "length is 100, too short for the 20 facts of a summary story: give 320 words or more",
        ),
        (lambda: load_task("riddle", 1), "unknown task 'riddle': choose from summary"),
    ],
)
def test_wrong_use_says_what_to_do(call, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        call()


def test_shots_are_small_and_of_training_words():
    measured, shots = load_task("yes_no", 2, shots=3)
    assert len(measured) == 2
    assert len(shots) == 3
    assert max(len(s.text.split()) for s in shots) < 60
    assert not set(re.findall(r"[A-Z][a-z]+", " ".join(s.text for s in shots))) & (
        every("places", True) | every("names", True)
    )


ROWS = {
    "boolq": [
        {"question": f"is it {i}", "title": "T", "passage": f"p{i} " * 9, "answer": i % 2 == 0}
        for i in range(4)
    ],
    "mutual": [{"article": "m : hi", "options": ["a", "b", "c", "d"], "answers": "B"}] * 4,
    "xsum": [{"article": f"long {i}", "summary": f"short {i}"} for i in range(4)],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    import gzip

    for name, rows in ROWS.items():
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
    monkeypatch.setenv("LESS_DATA", str(tmp_path))
    return tmp_path


def test_real_rows_become_examples(folder):
    measured, shots = load_task("boolq", 2, shots=1, length=4)
    assert shots[0].shown(answer=True).endswith("Question: is it 0?\nAnswer: yes")
    assert measured[0].shown(answer=True) == "T\np1 p1 p1 p1\nQuestion: is it 1?\nAnswer: no"
    assert load_task("mutual", 1)[0][0].shown(answer=True) == "m : hi b"
    assert load_task("xsum", 1)[0][0].options == ("short 0",)


def test_rows_that_are_missing_or_too_few_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"multi_news\.jsonl\.gz is not in \$LESS_DATA"):
        load_task("multi_news", 1)
    with pytest.raises(ValueError, match="has 4 rows, no more than the 4 shots"):
        load_task("xsum", 3, shots=4)
    (folder / "xsum.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match=r"is damaged \(BadGzipFile"):
        load_task("xsum", 1)
