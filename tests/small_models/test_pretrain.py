"""Pretraining: what is held out, what a window is, how the loss weighs.

And that an interrupted run ends where an uninterrupted one does.
"""

import dataclasses
import gzip
import importlib
import json
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lesslib.data import load_corpus
from lesslib.models import load_model
from lesslib.zoo import pretrain as command
from lesslib.zoo import run
from lesslib.zoo.loss import TRUTH, answer_weights, distilled_loss, weighted_loss
from lesslib.zoo.pretrain import pretrain
from lesslib.zoo.run import Settings
from lesslib.zoo.starts import GROWN, new_wide
from lesslib.zoo.text import HELD_OUT, MIX, Windows, split, token_file

# six steps of two windows of 32
SETTINGS = {
    "minutes": math.inf,
    "tokens": 6 * 2 * 32,
    "batch": 2,
    "lr": 1e-2,
    "seed": 3,
    "windows": 4,
}


def pretrained(start, out, **changes):
    """`pretrain` with SETTINGS but for the `changes`; the card."""
    return pretrain(Settings(start=start, out=out, **SETTINGS | changes))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A Llama of 12,000 parameters with the carried tokenizer."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    load_model("pico-llama", "cpu")[1].save_pretrained(folder)
    return str(folder)


@pytest.fixture
def corpora(tmp_path, monkeypatch):
    """A $LESS_DATA folder with 105 articles and 5 novels, and topics cut short."""
    rng = np.random.default_rng(0)
    words = ["the", "a", "cat", "dog", "sees", "old", "red", "tree", "and", "but"]
    for name, count, length in (("wikipedia", 105, 30), ("novels", 5, 300)):
        rows = [
            {"title": f"{name} {i}", "text": f"{name} {i}: " + " ".join(rng.choice(words, length))}
            for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl.gz").write_bytes(
            gzip.compress("\n".join(map(json.dumps, rows)).encode())
        )
    monkeypatch.setenv("LESS_DATA", str(tmp_path))
    monkeypatch.setattr("lesslib.data.corpora.LESSONS", 20)
    # equality to the bit is promised on CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return {name: load_corpus(name) for name in MIX}


def weights(folder):
    return load_model(folder / "model", "cpu")[0].state_dict()


def test_the_split_holds_out_the_same_documents_every_time(corpora):
    train, held = split(corpora)
    assert (train, held) == split(corpora)
    for name, count in HELD_OUT.items():
        assert len(held[name]) == count
        assert {d.title for d in held[name]}.isdisjoint(d.title for d in train[name])
        assert len(train[name]) + count == len(corpora[name].documents)
    assert not {d.text for d in held["topics"]} & {d.text for d in train["topics-train"]}


@pytest.mark.parametrize("begun", ["continued", "grown"])
@pytest.mark.parametrize("kind", ["exception in a step", "kill after a checkpoint"])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    start, corpora, tmp_path, monkeypatch, capsys, kind, begun
):
    monkeypatch.setattr("lesslib.zoo.grow.FIT", 2)
    begin, changes = start, {}
    if begun == "grown":
        # its heads meet at the fifth step
        begin, changes = GROWN, {"teacher": start, "merge": 0.9}
    whole = pretrained(begin, tmp_path / "whole", **changes)
    saves = []

    def save(path, state):
        write(path, state)
        if path.name != "checkpoint.pt":
            return
        saves.append(state["step"])
        if kind == "kill after a checkpoint" and len(saves) == 3:
            raise KeyboardInterrupt

    def clip(parameters, norm):
        if kind == "exception in a step" and len(saves) == 3:
            raise RuntimeError("out of memory")
        return clip_grad_norm(parameters, norm)

    with monkeypatch.context() as patch:
        write = run.write_torch
        clip_grad_norm = torch.nn.utils.clip_grad_norm_
        patch.setattr(run, "write_torch", save)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        with pytest.raises((KeyboardInterrupt, RuntimeError)):
            pretrained(begin, tmp_path / "cut", **changes, save_every=0)
    assert saves == [1, 2, 3]
    cut = pretrained(begin, tmp_path / "cut", **changes)
    assert "resumed at step 3" in capsys.readouterr().out
    assert cut["heldout_loss_by_position"] == whole["heldout_loss_by_position"]
    one = weights(tmp_path / "whole")
    other = weights(tmp_path / "cut")
    assert all(torch.equal(one[n], other[n]) for n in one)
    if begun == "grown":
        # two queries, one key, one value
        qkv = one["transformer.h.1.self_attention.query_key_value.weight"]
        assert qkv.shape == (2 * 4 + 2 * 4, 8)
        pretrained(begin, tmp_path / "still", **changes, lr=0.0)
        still = weights(tmp_path / "still")
        # and it did train
        assert all((one[n] - still[n]).abs().max() > 0 for n in one)
    else:
        before = load_model(start, "cpu")[0].state_dict()
        # and it did train
        assert any(not torch.equal(one[n], before[n].half().float()) for n in one)


@pytest.mark.parametrize(
    ("begin", "merge", "minutes"),
    [
        (GROWN, 0.0, math.inf),
        (GROWN, 1.0, math.inf),
        (GROWN, 0.5, 60),
        (None, 0.5, math.inf),
        (None, 1.0, math.inf),
    ],
)
def test_merging_belongs_to_a_grown_model_that_tokens_end(start, tmp_path, begin, merge, minutes):
    with pytest.raises(
        ValueError,
        match=f"--merge {merge:g}: grown-falcon needs a teacher, --minutes inf and a merge between "
        "0 and 1",
    ):
        pretrained(begin or start, tmp_path, minutes=minutes, teacher=start, merge=merge)
    assert not list(tmp_path.iterdir())


def test_a_falcon_does_not_grow_out_of_any_model(tmp_path):
    with pytest.raises(
        ValueError,
        match="no Falcon grows out of this model: it has model_type='falcon', not 'llama'",
    ):
        pretrained(GROWN, tmp_path, teacher="pico-falcon", merge=0.5)
    assert not list(tmp_path.iterdir())


def test_heads_meet_at_their_step_and_the_rate_decays_after_it(
    start, corpora, tmp_path, monkeypatch
):
    monkeypatch.setattr("lesslib.zoo.grow.FIT", 2)
    parts, rates = [], []
    merge = run.merge_heads
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        run, "merge_heads", lambda model, part: (parts.append(part), merge(model, part))
    )
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self: (rates.append(self.param_groups[0]["lr"]), step(self)),
    )
    pretrained(GROWN, tmp_path, teacher=start, merge=0.5)
    assert parts == pytest.approx([1 / 3, 1 / 2, 1, 1, 1, 1])
    # the fit of MLPs has its own
    warm = [rate / min(1, (i + 1) / 100) / SETTINGS["lr"] for i, rate in enumerate(rates[-6:])]
    assert warm == pytest.approx([1, 1, 1, 1, 0.01 + 0.99 * 2 / 3, 0.01 + 0.99 / 3])


def test_a_checkpoint_of_before_there_were_teachers_goes_on(start, corpora, tmp_path):
    pretrained(start, tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt")
    for name in ("teacher", "merge", "merge_steps"):
        del state["settings"][name]
    torch.save(state, tmp_path / "checkpoint.pt")
    pretrained(start, tmp_path)
    with pytest.raises(ValueError, match="was made with another teacher: repeat its settings"):
        pretrained(start, tmp_path, teacher="pico-llama")


def test_a_teacher_of_another_vocabulary_is_refused(start, tmp_path):
    foreign = tmp_path / "foreign"
    load_model(start, "cpu")[0].save_pretrained(foreign)
    tokenizer = load_model(start, "cpu")[1]
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(foreign)
    with pytest.raises(
        ValueError,
        match=r"teacher .*foreign.* has another vocabulary than .*: give one of the same tokenizer",
    ):
        pretrained(start, tmp_path / "out", teacher=str(foreign))


def test_a_teacher_counts_beside_the_text():
    """On its own logits a model's loss is the teacher's entropy and TRUTH times that on the text.

    Weights are as without a teacher.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 9, 5, generator=generator)
    ids = torch.randint(0, 5, (2, 9), generator=generator)
    p = logits[:, :-1].softmax(-1)
    weights = torch.ones(2, 8)
    for b in range(2):
        inside = False
        for t in range(8):
            # 3 for a colon, 4 for a newline
            inside = ids[b, t] == 3 or (inside and ids[b, t] != 4)
            weights[b, t] = 7.0 if inside else 1.0
    entropy = ((-(p * p.log()).sum(-1)) * weights).sum() / weights.sum()
    by_answers = answer_weights(ids, 3, 4, 7.0)
    of_text = weighted_loss(logits, ids, by_answers)
    assert distilled_loss(logits, ids, by_answers, logits).item() == pytest.approx(
        (entropy + TRUTH * of_text).item(), rel=1e-5
    )


def test_the_learning_rate_does_not_follow_the_clock_while_tokens_bind(
    start, corpora, tmp_path, monkeypatch
):
    pretrained(start, tmp_path / "fast")
    clock = iter(range(0, 10_000, 2))
    # every look at the clock takes two seconds
    monkeypatch.setattr(run.time, "time", lambda: float(next(clock)))
    pretrained(start, tmp_path / "slow", minutes=60)
    one = weights(tmp_path / "fast")
    other = weights(tmp_path / "slow")
    assert all(torch.equal(one[n], other[n]) for n in one)
    card = pretrained(start, tmp_path / "short", minutes=0.2)  # 12 seconds
    assert 0 < card["steps"] < 6


def test_a_finished_run_is_not_trained_further_and_its_card_tells_of_it(
    start, corpora, tmp_path, monkeypatch
):
    card = pretrained(start, tmp_path)
    first = weights(tmp_path)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: pytest.fail("a step after the end"))
    again = pretrained(start, tmp_path)
    assert {**card, "minutes": 0} == {**again, "minutes": 0}
    assert all(
        torch.equal(a, b) for a, b in zip(first.values(), weights(tmp_path).values(), strict=True)
    )
    assert json.loads((tmp_path / "model" / "card.json").read_text()) == again
    assert card["steps"] == 6
    assert card["tokens_seen_millions"] == round(6 * 2 * 32 / 1e6, 2)
    assert card["data"]["novels"] == corpora["novels"].record() | {
        "share": 0.38,
        "held_out_documents": 3,
    }
    for losses in card["heldout_loss_by_position"].values():
        assert set(losses) == {"wikipedia", "novels", "topics"}
        # 31 positions lie in one bin
        assert losses["novels"]["by_position"] == [pytest.approx(losses["novels"]["all"], abs=1e-4)]


def test_checkpoints_that_do_not_fit_are_refused(start, corpora, tmp_path):
    pretrained(start, tmp_path)
    for change in ({"lr": 2e-2}, {"batch": 1}, {"seed": 4}):
        with pytest.raises(
            ValueError, match=rf"checkpoint\.pt was made with another {next(iter(change))}"
        ):
            pretrained(start, tmp_path, **change)
    checkpoint = tmp_path / "checkpoint.pt"
    for content in (checkpoint.read_bytes()[:5000], b"", b"no checkpoint"):
        checkpoint.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"checkpoint\.pt is damaged .*delete it to start over"
        ):
            pretrained(start, tmp_path)


def test_text_that_does_not_suffice_is_refused(corpora, monkeypatch):
    monkeypatch.setitem(HELD_OUT, "novels", 5)
    with pytest.raises(ValueError, match="'novels' has 5 documents and 5 are held out"):
        split(corpora)
    with pytest.raises(ValueError, match="no held-out document fills a window of 9 tokens"):
        Windows(np.array([0, 1, 2, 0, 3], dtype=np.uint16), 9, 0).inside(4)


def test_a_diverged_run_stops_and_says_what_to_lower(start, corpora, tmp_path):
    with pytest.raises(FloatingPointError, match=r"lower --lr from 1e\+20"):
        pretrained(start, tmp_path, lr=1e20, tokens=60 * 2 * 32)


# ---------------------------------------------------------------- tokens and windows
def test_token_files_follow_text_and_vocabulary(corpora, tmp_path):
    tokenizer = load_model("pico-llama", "cpu")[1]
    documents = list(corpora["novels"].documents)
    tokens = token_file(tmp_path, "novels", documents, tokenizer)
    joined = [
        i for d in documents for i in [tokenizer.bos_token_id, *tokenizer(d.text)["input_ids"]]
    ]
    assert tokens.tolist() == joined
    assert token_file(tmp_path, "novels", documents, tokenizer).tolist() == joined
    files = list(tmp_path.glob("novels*.pt"))
    assert len(files) == 1
    assert len(token_file(tmp_path, "novels", documents[1:], tokenizer)) < len(joined)
    assert len(list(tmp_path.glob("novels*.pt"))) == 2
    files[0].write_bytes(files[0].read_bytes()[:100])
    with pytest.raises(ValueError, match=r"novels-.*\.pt is damaged .*delete it"):
        token_file(tmp_path, "novels", documents, tokenizer)


def test_windows_stay_inside_documents_that_are_long_enough():
    lengths = [40, 3, 8, 25, 1, 60]
    tokens = np.concatenate(
        [[0, *(np.arange(n - 1) + 100 * (i + 1))] for i, n in enumerate(lengths)]
    ).astype(np.uint16)
    windows, begins = Windows(tokens, 8, 0), np.concatenate([[0], np.cumsum(lengths)])
    drawn = [windows.at(p) for p in range(len(tokens))]
    assert all(len(w) == 8 and w.dtype == np.int64 and w[0] == 0 for w in drawn)
    for position in range(len(tokens)):
        document = int(np.searchsorted(begins, position, side="right")) - 1
        if lengths[document] >= 8:
            assert set((windows.at(position)[windows.at(position) > 0] // 100).tolist()) == {
                document + 1
            }
    inside = windows.inside(1000)
    assert [w.document for w in inside] == [i for i, n in enumerate(lengths) for _ in range(n // 8)]
    rows = np.array([w.ids for w in inside])
    assert rows.shape == (sum(n // 8 for n in lengths), 8)
    assert all(len(set((w[w > 0] // 100).tolist())) == 1 and (w[1:] > 0).all() for w in rows)
    assert windows.inside(3) == [inside[0], inside[(len(inside) - 1) // 2], inside[-1]]


def test_the_card_holds_the_mean_loss_by_position_over_the_held_out_windows(
    start, corpora, tmp_path, monkeypatch
):
    # the package has a function of the module's name
    module = importlib.import_module("lesslib.evaluation.perplexity")
    monkeypatch.setattr(module, "POSITION_BIN", 16)
    card = pretrained(start, tmp_path)
    model, tokenizer = load_model(start, "cpu")
    for name, documents in split(corpora)[1].items():
        windows = Windows(
            token_file(tmp_path, name, documents, tokenizer), 32, tokenizer.bos_token_id
        ).inside(4)
        x = torch.tensor([w.ids for w in windows])
        with torch.no_grad():
            losses = -model(x).logits[:, :-1].log_softmax(-1).gather(2, x[:, 1:, None])[..., 0]
        recorded = card["heldout_loss_by_position"]["start"][name]
        assert recorded["all"] == pytest.approx(losses.mean().item(), abs=1e-3)
        assert recorded["by_position"] == pytest.approx(
            [part.mean().item() for part in (losses[:, :16], losses[:, 16:])], abs=1e-3
        )


def test_what_follows_a_colon_in_its_line_counts_as_often_as_asked():
    colon = 1
    newline = 2
    ids = torch.randint(3, 9, (2, 12))
    # tokens 5, 6 and 7 follow
    ids[0, [2, 4, 7, 9]] = torch.tensor([newline, colon, newline, newline])
    # the newline itself, and 9 to the end
    ids[1, [0, 1, 8]] = torch.tensor([colon, newline, colon])
    weights = torch.ones(2, 11)
    weights[0, [4, 5, 6]] = weights[1, [0, 8, 9, 10]] = 10
    logits = torch.randn(2, 12, 9)
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
    )
    for weight, expected in (
        (10.0, (losses * weights).sum() / weights.sum()),
        (1.0, losses.mean()),
    ):
        by_answers = answer_weights(ids, colon, newline, weight)
        assert weighted_loss(logits, ids, by_answers).item() == pytest.approx(
            expected.item(), rel=1e-5
        )


def test_stories_take_their_share_and_their_answers_count(start, corpora, tmp_path):
    card = pretrained(start, tmp_path / "stories", stories=0.5, answers=5.0)
    assert {name: d["share"] for name, d in card["data"].items()} == {
        "wikipedia": 0.285,
        "novels": 0.19,
        "topics-train": 0.025,
        "stories-train": 0.5,
    }
    assert card["command"].endswith("--stories 0.5 --answers 5")
    assert set(card["heldout_loss_by_position"]["this model"]) == {
        "wikipedia",
        "novels",
        "topics",
        "stories",
    }
    pretrained(start, tmp_path / "even", stories=0.5)
    one = weights(tmp_path / "stories")
    other = weights(tmp_path / "even")
    assert any(not torch.equal(one[n], other[n]) for n in one)
    with pytest.raises(ValueError, match=r"was made with another answers"):
        pretrained(start, tmp_path / "stories", stories=0.5)


def test_echoes_say_a_stretch_over_and_over(start, corpora, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        run,
        "weighted_loss",
        lambda logits, ids, *rest: seen.append(ids) or weighted_loss(logits, ids, *rest),
    )
    card = pretrained(start, tmp_path / "echoes", echoes=0.999999)
    assert card["command"].endswith("--echoes 0.999999")
    rows = torch.cat(seen)
    assert rows.shape == (12, 32)
    assert (rows[:, 0] == 0).all()
    # 31 tokens, stretches of 8 at the most
    for row in rows:
        assert any(torch.equal(row[1 + n :], row[1:-n]) for n in range(1, 9))
    with pytest.raises(ValueError, match=r"was made with another echoes"):
        pretrained(start, tmp_path / "echoes")


def test_the_command_line_passes_every_setting(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(command, "pretrain", seen.append)
    monkeypatch.setattr(command, "keep_memory", lambda: None)
    monkeypatch.setattr(
        "sys.argv",
        f"pretrain --start a --out {tmp_path} --minutes inf --lr 0.1 --windows 5".split(),
    )
    command.main()
    assert [dataclasses.asdict(settings) for settings in seen] == [
        {
            "start": "a",
            "out": tmp_path,
            "minutes": math.inf,
            "tokens": 100_000_000,
            "batch": 8,
            "lr": 0.1,
            "seed": 0,
            "windows": 5,
            "stories": 0.0,
            "answers": 1.0,
            "echoes": 0.0,
            "teacher": "",
            "merge": 0.0,
            "save_every": 240,
        }
    ]


def test_the_wide_model_begins_as_the_same_function_of_twice_the_parameters():
    llama, wide = load_model("pico-llama-stories", "cpu")[0], new_wide(0)[0].eval()
    assert 1.8 < wide.num_parameters() / llama.num_parameters() < 2.2
    ids = torch.randint(4096, (2, 40), generator=torch.Generator().manual_seed(0))
    out = wide(ids).logits
    torch.testing.assert_close(out, llama(ids).logits, atol=2e-5, rtol=1e-5)
    out.square().mean().backward()
    # and what was added can learn: its outputs' weights have gradients
    for name, old in llama.named_parameters():
        added = wide.get_parameter(name).grad
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert added[:, old.shape[1] :].abs().min() > 0
