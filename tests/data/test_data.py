"""Corpora: where text comes from, what is held out, and what a damaged or missing one says."""

import gzip
import json
import re
from pydoc_data import topics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lesslib.data import (
    Corpus,
    Document,
    Source,
    corpora,
    encode,
    hub,
    load_corpus,
    missing,
    training_windows,
)
from lesslib.data.topics import HELDOUT_SHARE, MIN_SHARED, split_topics
from lesslib.models import load_model


@pytest.fixture(scope="module")
def tokenizer():
    return load_model("pico-llama", "cpu")[1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LESS_DATA", str(tmp_path))
    return tmp_path


def write_jsonl(path, rows):
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))


def paragraphs(documents):
    long = set()
    for document in documents:
        for paragraph in re.split(r"\n\s*\n", document.text):
            words = " ".join(paragraph.split())
            if len(words) >= MIN_SHARED:
                long.add(words)
    return long


# ---------------------------------------------------------------- carried text
def test_carried_text_is_split_without_overlap_and_without_loss():
    train = load_corpus("topics-train")
    heldout = load_corpus("topics-heldout")
    assert not paragraphs(train.documents) & paragraphs(heldout.documents)
    everything = paragraphs([Document(n, t) for n, t in topics.topics.items()])
    assert paragraphs(train.documents) | paragraphs(heldout.documents) == everything
    names = "+".join(d.title for d in train.documents + heldout.documents).split("+")
    assert sorted(names) == sorted(topics.topics)
    heldout_characters = heldout.record()["characters"]
    share = heldout_characters / (heldout_characters + train.record()["characters"])
    assert 0.5 * HELDOUT_SHARE < share <= HELDOUT_SHARE


# text of another Python version: any topics over any paragraphs, many of them shared
PARAGRAPHS = [f"Paragraph {i}: " + f"word{i} " * 20 for i in range(12)]
TOPICS = st.dictionaries(
    st.from_regex(r"[a-z]{1,6}", fullmatch=True),
    st.lists(st.sampled_from(PARAGRAPHS), min_size=1, max_size=4).map("\n\n".join),
    min_size=2,
)


@settings(deadline=None, max_examples=60)
@given(TOPICS)
def test_the_split_follows_the_text_of_any_python_version(texts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topics, "topics", texts)
        train = tuple(split_topics(heldout=False))
        heldout = tuple(split_topics(heldout=True))
    assert train
    assert not paragraphs(train) & paragraphs(heldout)
    assert paragraphs(train) | paragraphs(heldout) == paragraphs(
        [Document(n, t) for n, t in texts.items()]
    )


def test_a_record_names_origin_and_hash_and_the_hash_follows_the_text():
    corpus = load_corpus("topics-heldout")
    record = corpus.record()
    assert (record["origin"], record["sha256"]) == ("carried", load_corpus("topics-heldout").sha256)
    first, *rest = corpus.documents
    changed = Corpus(corpus.name, corpus.origin, (Document(first.title, first.text + "."), *rest))
    assert changed.sha256 != corpus.sha256


# ---------------------------------------------------------------- files of $LESS_DATA
def test_a_folder_gives_its_documents_in_order_with_titles(folder):
    write_jsonl(
        folder / "books_heldout.jsonl.gz",
        [{"title": "A", "text": "one"}, {"text": "two"}, {"text": "  "}],
    )
    corpus = load_corpus("books")
    assert corpus.origin == "folder"
    assert corpus.documents == (Document("A", "one"), Document("books_heldout.jsonl.gz:2", "two"))


def test_wikitext_is_split_into_articles_not_sections(folder):
    text = (
        " = First = \n Some text = here . \n = = Section = = \n More . \n"
        " = Second One = \n Other text . \n"
    )
    (folder / "wikitext2_raw_test.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert [d.title for d in load_corpus("wikitext2").documents] == ["First", "Second One"]


GOOD = gzip.compress((json.dumps({"text": "word " * 5000}) + "\n").encode(), mtime=0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (GOOD[:-20], "damaged"),
        (GOOD[:40] + b"\xff" * 20 + GOOD[60:], "damaged"),
        (b"this is not gzip", "damaged"),
        (b"", "holds no text"),
        (gzip.compress(b""), "holds no text"),
        (gzip.compress(b'{"text": " "}\n'), "holds no text"),
        (gzip.compress(b'{"text": "a"}\n{"text": \n'), "line 2"),
        (gzip.compress(b'{"title": "a"}\n'), "line 1"),
        (gzip.compress(b'{"text": 5}\n'), "line 1"),
        (gzip.compress(b"[1, 2]\n"), "line 1"),
        (gzip.compress(b'{"text": "\xff"}\n'), "damaged"),
    ],
    ids=range(11),  # not the bytes, in which gzip puts the time
)
def test_a_damaged_or_empty_file_is_named_with_the_fix(folder, content, says):
    path = folder / "c4.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as e:
        load_corpus("c4")
    assert str(path) in str(e.value)
    assert "copy" in str(e.value)


def test_a_missing_file_is_named_with_the_fix(folder):
    assert "books_heldout.jsonl.gz" in missing("books")
    assert "unset LESS_DATA" in missing("books")
    with pytest.raises(FileNotFoundError, match=r"books_heldout\.jsonl\.gz is not in \$LESS_DATA"):
        load_corpus("books")
    assert missing("topics-train") is None


def test_an_unknown_corpus_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown corpus 'wiki'.*wikitext2"):
        load_corpus("wiki")


def test_without_a_folder_an_unreachable_hub_is_said_at_once(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv("LESS_DATA", raising=False)
    # the discard port: refused at once
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FileNotFoundError, match="hub cannot be reached; set LESS_DATA"):
        load_corpus("c4")


def test_a_failing_download_names_the_cause_and_the_fix(monkeypatch):
    def fail():
        raise ConnectionError("no route")

    monkeypatch.delenv("LESS_DATA", raising=False)
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    monkeypatch.setitem(corpora.SOURCES, "c4", Source("c4.jsonl.gz", fail))
    with pytest.raises(FileNotFoundError, match=r"no route.*set LESS_DATA"):
        load_corpus("c4")
    monkeypatch.setitem(
        corpora.SOURCES, "c4", Source("c4.jsonl.gz", lambda: [Document("t", "row")])
    )
    assert load_corpus("c4").origin == "hub"


# ---------------------------------------------------------------- training windows
def test_training_windows_hold_each_corpus_in_equal_shares_without_repeats(tokenizer):
    one = Corpus(
        "one", "folder", tuple(Document(str(i), f"alpha {i} beta gamma " * 40) for i in range(9))
    )
    two = Corpus("two", "folder", (Document("t", " ".join(f"number {i}" for i in range(900))),))
    windows = training_windows([one, two], tokenizer, 33, 20, seed=3)
    assert windows.shape == (20, 33)
    assert (windows[:, 0] == tokenizer.bos_token_id).all()
    assert not (windows[:, 1] == tokenizer.bos_token_id).any()
    assert sum("number" in tokenizer.decode(w) for w in windows) == 10
    second = encode(tokenizer, two.documents[0].text)[1:]
    cuts = {tuple(second[i : i + 32]) for i in range(0, 320, 32)}
    assert cuts <= {tuple(w[1:].tolist()) for w in windows}
    assert torch.equal(windows, training_windows([one, two], tokenizer, 33, 20, seed=3))
    assert not torch.equal(windows, training_windows([one, two], tokenizer, 33, 20, seed=4))


def test_too_little_text_is_refused(tokenizer):
    corpus = Corpus("short", "folder", (Document("t", "a few words only"),))
    with pytest.raises(
        ValueError, match=r"'short' holds \d+ tokens, fewer than one window of 1024"
    ):
        training_windows([corpus], tokenizer, 1024, 1, seed=0)
    with pytest.raises(ValueError, match="ask for fewer sequences"):
        training_windows([corpus], tokenizer, 4, 500, seed=0)
