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


# one token in one cache: 4 layers, keys and values of 3 heads of 32, 2 rows
TOKEN = 4 * 2 * 3 * 32 * 4 * 2


def test_both_serve_the_same_load_and_their_bytes_are_read_at_every_step(stand_in, monkeypatch):
    """Of grouped heads and tied tables; logits are compared with ours on the way."""
    grouped = peers.MODELS["pico"] | {"tie_word_embeddings": True, "num_key_value_heads": 3}
    monkeypatch.setitem(peers.MODELS, "pico", grouped)
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


def answered(held: list[int]) -> dict:
    return {"prompt_s": [1.0, 3.0, 2.0], "decode_s": [2.0] * 3, "seconds": 4.0, "bytes": held}


def test_the_command_prints_records_and_resumes(monkeypatch, capsys):
    def measured(case, load, python):
        rows = {"LESS": answered([2**20] * 3), "DecodingPress": answered([3, 4, 2])}
        rows["DecodingPress"]["seconds"] = 6.0
        return {"methods": rows, "peer": {"kvpress": "0.0", "torch": "1"}}

    monkeypatch.setattr(peer_environment, "peer_python", lambda: Path(sys.executable))
    monkeypatch.setattr(peers, "measure_peers", measured)
    words = "peers --models pico --lengths 40+12 --batches 2 --budget 20 --hidden 8"
    words += " --methods LESS --presses DecodingPress"
    command.main(words.split())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("pico 40+12, batch 2, budget 20, kernels 8 wide; ")
    assert lines[1] == "the peer: kvpress 0.0, torch 1; KnormPress, every 10 steps"
    both = "2.00 (1.00 to 3.00) 2.00 (2.00 to 2.00) 4.00 (3.00 to 5.00)"
    assert [" ".join(line.split()) for line in lines[3:5]] == [
        f"LESS {both} 1.00",
        f"DecodingPress {both} 1.50",
    ]
    assert lines[5].strip() == "LESS: cache of 1.000 MiB at every step"
    assert lines[6].strip().startswith("DecodingPress: cache of 0.000 MiB after the prompt")
    (entry,) = BenchmarkRecord("peers").entries().values()
    assert entry["parameters"]["interval"] == 10
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
