"""The peer's process, with a stand-in for kvpress; its environment, with one for pip."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lesslib.bench import command, peer_environment, peers
from lesslib.bench.load import LoadOfSlots
from lesslib.bench.peer_environment import PeerMissing, peer_python
from lesslib.bench.peers import PeersCase, check_same_model, course_of_bytes, measure_peers
from lesslib.bench.record import BenchmarkRecord
from lesslib.bench.served_model import ServedModel

STAND_IN = Path(__file__).with_name("peer_stand_in.py")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """An interpreter that finds a package called kvpress."""
    shutil.copy(STAND_IN, tmp_path / "kvpress.py")
    described = tmp_path / "kvpress-0.0.dist-info" / "METADATA"
    described.parent.mkdir()
    described.write_text("Metadata-Version: 2.1\nName: kvpress\nVersion: 0.0\n")
    monkeypatch.setattr(peers, "PATH", os.pathsep.join([peers.PATH, str(tmp_path)]))
    return Path(sys.executable)


def case(**changes) -> PeersCase:
    fields = {
        "models": ("pico",),
        "lengths": ("40+33",),
        "batches": (2,),
        "methods": peers.OURS,
        "budget": 20,
        "hidden": 8,
        "runs": 2,
    }
    return PeersCase(**fields | changes)


# one token in one cache: 4 layers, keys and values of 192 numbers, 2 rows
TOKEN = 4 * 2 * 192 * 4 * 2


def test_both_serve_the_same_load_and_their_bytes_are_read_at_every_step(stand_in):
    (load,) = case().each()
    found = measure_peers(case(), load, stand_in)
    assert found["peer"]["kvpress"] == "0.0"
    assert found["peer"]["torch"] == torch.__version__
    rows = found["methods"]
    assert list(rows) == ["Baseline", "LESS", "PrefillDecodingPress", "DecodingPress"]
    for row in rows.values():
        assert len(row["prompt_s"]) == len(row["decode_s"]) == 2
        assert row["seconds"] > 0
        assert len(row["bytes"]) == 33
    assert len(set(rows["LESS"]["bytes"])) == len(set(rows["Baseline"]["bytes"])) == 1
    # whole until the tenth step, then budget to budget + 9
    tokens = [held / TOKEN for held in rows["DecodingPress"]["bytes"]]
    assert tokens[:10] == list(range(40, 50))
    assert tokens[10:30] == [*range(20, 30)] * 2
    # compressed from the start
    tokens = [held / TOKEN for held in rows["PrefillDecodingPress"]["bytes"]]
    assert tokens[:30] == [*range(20, 30)] * 3


def test_tied_tables_reach_the_peer(stand_in, monkeypatch):
    tied = peers.MODELS["pico"] | {"tie_word_embeddings": True, "num_key_value_heads": 3}
    monkeypatch.setitem(peers.MODELS, "pico", tied)
    small = case(runs=1, methods=("LESS",), presses=("DecodingPress",))
    (load,) = small.each()
    # its logits are compared with ours on the way
    assert list(measure_peers(small, load, stand_in)["methods"]) == ["LESS", "DecodingPress"]


def test_another_model_over_there_is_refused():
    check_same_model({"first": [1.0, 2.0]}, {"first": [1.0002, 2.0]})
    with pytest.raises(RuntimeError, match="other logits than ours"):
        check_same_model({"first": [1.0, 2.0]}, {"first": [1.1, 2.0]})


def test_a_peer_that_dies_is_an_error(tmp_path):
    # no kvpress there
    served = ServedModel(LoadOfSlots("pico", 40, 12, 2, hidden=8, slots=20))
    with pytest.raises(RuntimeError, match="the peer's process ended"):
        peers.PeerProcess(Path(sys.executable), served, tmp_path / "none")


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ([2**20] * 5, "1.000 MiB at every step"),
        ([2**20, 2 * 2**20, 2**20], "1.000 to 2.000 MiB"),
        (
            [4 * 2**20, 5 * 2**20, 2**20, 2 * 2**20, 2**20],
            "4.000 MiB after the prompt, at most 5.000; from step 2 on 1.000 to 2.000",
        ),
    ],
)
def test_the_course_of_bytes_in_words(held, words):
    assert course_of_bytes(held) == words


def test_the_command_prints_records_and_resumes(stand_in, monkeypatch, capsys):
    monkeypatch.setattr(peer_environment, "peer_python", lambda: stand_in)
    words = "peers --models pico --lengths 40+12 --batches 2 --budget 20 --hidden 8 --runs 1"
    command.main(words.split())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("pico 40+12, batch 2, budget 20, kernels 8 wide; ")
    assert lines[1].startswith("the peer: kvpress 0.0, torch ")
    assert lines[1].endswith("KnormPress, every 10 steps")
    names = ["Baseline", "LESS", "PrefillDecodingPress", "DecodingPress"]
    assert [line.split()[0] for line in lines[3:7]] == names
    assert lines[4].split()[-1] == "1.00"
    assert "LESS: cache of" in lines[8]
    assert "at every step" in lines[8]
    entries = BenchmarkRecord("peers").entries()
    assert set(entries["pico 40+12, batch 2, budget 20"]["methods"]) == set(names)
    # not measured again, and no environment made
    monkeypatch.setattr(peer_environment, "peer_python", lambda: pytest.fail("made again"))
    command.main(words.split())
    assert capsys.readouterr().out.splitlines() == lines


# ---------------------------------------------------------------- its environment
class Pip:
    """Stands for subprocess.run: notes commands, and fails at the first that holds `fails`."""

    def __init__(self, fails: str = "\0"):
        self.fails = fails
        self.commands: list[str] = []

    def __call__(self, words, **settings):
        line = " ".join(words)
        self.commands.append(line)
        failed = self.fails in line
        said = "ERROR: No matching distribution found" if failed else ""
        return subprocess.CompletedProcess(words, int(failed), "", said)


@pytest.fixture
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_the_environment_has_our_torch_and_is_made_once(cache_home, monkeypatch):
    pip = Pip()
    monkeypatch.setattr(peer_environment, "subprocess", SimpleNamespace(run=pip))
    python = peer_python()
    torch_version = torch.__version__.split("+")[0]
    made, needs, peer, tried = pip.commands
    assert made == f"{sys.executable} -m venv {python.parents[1]}"
    assert f" torch=={torch_version} " in needs
    assert peer.endswith(f" --no-deps kvpress=={peer_environment.VERSION}")
    assert tried == f"{python} -c import kvpress"
    assert json.loads((python.parents[1] / "ready.json").read_text())["torch"] == torch_version
    assert peer_python() == python
    assert len(pip.commands) == 4


def test_an_unfinished_environment_is_made_again(cache_home, monkeypatch):
    monkeypatch.setattr(peer_environment, "subprocess", SimpleNamespace(run=Pip("--no-deps")))
    with pytest.raises(PeerMissing):
        peer_python()
    rest = peer_environment.folder() / "half"
    rest.parent.mkdir(exist_ok=True)
    rest.touch()
    monkeypatch.setattr(peer_environment, "subprocess", SimpleNamespace(run=Pip()))
    peer_python()
    assert not rest.exists()


def test_where_the_peer_cannot_be_installed_the_command_says_so(cache_home, monkeypatch):
    monkeypatch.setattr(peer_environment, "subprocess", SimpleNamespace(run=Pip("--no-deps")))
    words = "peers --models pico --lengths 40+12 --batches 2 --budget 20 --runs 1"
    with pytest.raises(SystemExit) as ended:
        command.main(words.split())
    said = str(ended.value)
    assert said.startswith("kvpress cannot be installed here, so nothing is compared.")
    assert said.endswith("ERROR: No matching distribution found")
    assert BenchmarkRecord("peers").entries() == {}


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(PeerMissing, match=r"cannot write .*file"):
        peer_python()
