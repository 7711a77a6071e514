"""Storyworld: held-out words, answers that follow from the text alone, and nothing else that gives them away."""
import json
import random
import re
from collections import Counter

import pytest

from lesslib.data.storyworld import KINDS, LEADS, examples, grammar, lessons, new_world, story, words
from lesslib.data.tasks import load_task


def test_there_are_more_than_sixty_sentence_patterns():
    g = grammar()
    patterns = [p for r in g["relations"].values() for p in r["told"] + r["again"]] + g["openings"] + g["deeds"] + g["scenes"]
    assert len(set(patterns)) == len(patterns) >= 60


@pytest.mark.parametrize("kind", ["women", "men", "places", "nouns", "trades"])
def test_words_are_for_training_or_held_out(kind):
    train, held = set(words(kind, False)), set(words(kind, True))
    assert train
    assert held
    assert not train & held
    assert train | held == set(grammar()[kind])
    if kind != "women":
        return
    named = set(re.findall(r"[A-Z][a-z]+", " ".join(lessons(60, seed=0))))
    assert not named & (held | set(words("men", True)) | set(words("places", True)))


@pytest.mark.parametrize("kind", KINDS)
def test_examples_are_seeded_and_do_not_depend_on_their_count(kind):
    few = examples(kind, 2, seed=3)
    assert few == examples(kind, 5, seed=3)[:2]
    assert few[0] != few[1]
    assert few[0] != examples(kind, 1, seed=4)[0]


def test_a_story_tells_every_fact_and_its_length_is_as_asked():
    for i in range(20):
        rng = random.Random(i)
        world = new_world(rng, 4, tuple(grammar()["relations"]), heldout=True)
        text = story(rng, world, 450, tellings=i % 2 == 1)
        sentences = re.split(r"(?<=[.?!])\s", text)
        for fact in world.facts.values():
            assert any(fact.person in s and fact.value in s and fact.other in s for s in sentences), (fact, text)
        assert 440 <= len(text.split()) <= 640
    assert 2200 <= len(examples("summary", 1, length=2300)[0].text.split()) <= 2400


def test_yes_and_no_answers_are_true():
    for e in examples("yes_no", 60):
        told = re.split(r"(?<=[.?!])\s", e.text)[1:]  # but the opening
        asked = e.lead.split("Question: ")[1].split("?")[0]
        names = [w for w in asked.split()[1:] if w in grammar()["men"] + grammar()["women"]]
        rest = [w for w in asked.split() if re.search(rf"\b{w}\b", " ".join(told)) and w not in names]
        value = [w for w in rest if w in words("places", True) + words("nouns", True) + words("trades", True)]
        assert len(value) == 1, (asked, value)
        said = [set(re.findall(r"\w+", s)) for s in told]
        assert any({value[0], *names} <= s for s in said) == (e.options[e.right] == "yes"), e


def test_wrong_replies_are_true_of_others_in_the_same_story():
    for e in examples("reply", 40):
        assert len(set(e.options)) == 4
        values = [re.sub(r'^"(I live in|I am a|I carry the|I travelled to|I promised you a) |\."$', "", o) for o in e.options]
        assert all(v in e.text for v in values), values


def test_nothing_but_the_text_gives_the_answer_away():
    yes_no, reply = examples("yes_no", 2000, length=320), examples("reply", 400, length=320)
    assert abs(sum(e.right == 0 for e in yes_no) / 2000 - 0.5) < 0.04
    assert max(Counter(e.right for e in reply).values()) < 0.33 * 400
    assert "" not in {e.shown(text=False) for e in reply}
    assert all(e.text not in e.shown(text=False) for e in reply)


@pytest.mark.parametrize("kind", LEADS)
def test_what_a_summary_says_stands_in_the_text(kind):
    for e in examples(kind, 10):
        reference = e.options[0]
        names = set(re.findall(r"\b[A-Z][a-z]+", reference))
        assert len(names) >= 3
        assert all(n in e.text for n in names)
        assert e.shown(answer=True) == f"{e.text}\n{LEADS[kind]} {reference}"


@pytest.mark.parametrize(("call", "says"), [
    (lambda: examples("riddle", 1), "unknown kind of task 'riddle': choose from summary, sentence"),
    (lambda: examples("summary", 1, length=100), "length is 100, too short for the 20 facts of a summary story: give 320 words or more"),
    (lambda: load_task("riddle", 1), "unknown task 'riddle': choose from summary"),
])  # fmt: skip
def test_wrong_use_says_what_to_do(call, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        call()


def test_shots_are_small_and_of_training_words():
    found, shots = load_task("yes_no", 2, shots=3)
    assert len(found) == 2
    assert len(shots) == 3
    assert max(len(s.text.split()) for s in shots) < 60
    assert not set(re.findall(r"[A-Z][a-z]+", " ".join(s.text for s in shots))) & set(words("places", True))


ROWS = {
    "boolq": [{"question": f"is it {i}", "title": "T", "passage": f"p{i} " * 9, "answer": i % 2 == 0} for i in range(4)],
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
    found, shots = load_task("boolq", 2, shots=1, length=4)
    assert shots[0].shown(answer=True).endswith("Question: is it 0?\nAnswer: yes")
    assert found[0].shown(answer=True) == "T\np1 p1 p1 p1\nQuestion: is it 1?\nAnswer: no"
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
