"""Ranks of torchrun: they share layers and batches, end with what one process gives, and what a
killed one leaves is taken up.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from lesslib import H2O
from lesslib.states import Kernels
from lesslib.training import Recipe, all_layers, command, parts, share, train
from lesslib.util import ranks
from lesslib.util.paths import ROOT
from lesslib.util.progress import progress

SMALL = {
    "profile": "smoke",
    "sequences": 4,
    "validation": 1,
    "epochs": 20,
    "length": 96,
    "hidden": 32,
    "dropout": 0.3,
    "fraction": 0.02,
    "device": "cpu",
    "memory-gib": 1e-9,
}

# Seconds; a start takes 10.
LIMIT = 120


@pytest.fixture(autouse=True)
def _no_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def arguments(out: Path) -> list[str]:
    return [f"--{name}={value}" for name, value in {**SMALL, "out": out}.items()]


def kernels_of(out: Path) -> Kernels:
    return Kernels.load(out / "pico-llama" / "h2o-0.02.safetensors")


def parts_of(out: Path) -> Path:
    return out / "pico-llama" / "h2o-0.02.safetensors.parts"


def same(a: Kernels, b: Kernels) -> bool:
    weights = a.state_dict()
    others = b.state_dict()
    if weights.keys() != others.keys():
        return False
    return all(torch.equal(weights[name], others[name]) for name in weights)


def workers(agent: subprocess.Popen) -> dict[str, int]:
    """{rank: process id} of what torchrun started."""
    pids = {}
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    if word.startswith(b"RANK="):
                        pids[word.removeprefix(b"RANK=").decode()] = int(pid)
    return pids


@contextlib.contextmanager
def torchrun(log: Path, *command):
    """torchrun with two ranks; nothing of it outlives the context."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GOMP_SPINCOUNT": "1000",
        "PYTHONPATH": str(ROOT),
    }
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        *map(str, command),
    ]
    with log.open("w") as f:
        agent = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=f, stderr=subprocess.STDOUT
        )
    try:
        yield agent
    finally:
        if agent.poll() is None:
            for pid in (*workers(agent).values(), agent.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        agent.wait()


def run(log: Path, *command) -> list[str]:
    """The sorted lines of "rank ... layers ..." that `command` printed under torchrun."""
    with torchrun(log, *command) as agent:
        assert agent.wait(LIMIT) == 0, log.read_text()
    lines = log.read_text().splitlines()
    # Rank 0 alone speaks of the whole.
    assert sum(line.startswith("saved") for line in lines) <= 1
    return sorted(line for line in lines if line.startswith("rank "))


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Kernels:
    out = tmp_path_factory.mktemp("single")
    command.main(arguments(out))
    return kernels_of(out)


def test_two_ranks_share_the_layers_and_end_with_the_weights_of_one_process(single, tmp_path):
    out = tmp_path / "out"
    assert run(tmp_path / "log", "-m", "lesslib.train", *arguments(out)) == [
        "rank 0 of 2 on cpu: layers 0, 2",
        "rank 1 of 2 on cpu: layers 1, 3",
    ]
    assert same(kernels_of(out), single)
    # All is the same, the curves too, but the seconds.
    header = kernels_of(out).header
    expected = single.header
    for curves in (header["curves"], expected["curves"]):
        assert len(curves) == 4
        for curve in curves.values():
            for part in ("seconds_capture", "seconds_eviction", "seconds"):
                assert curve.pop(part) > 0
    assert header == expected
    assert not parts_of(out).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="ranks are found through /proc")
def test_a_killed_rank_ends_the_start_and_the_next_one_trains_what_is_left(single, tmp_path):
    out = tmp_path / "ranks"
    log = tmp_path / "log"
    with torchrun(log, "-m", "lesslib.train", *arguments(out)) as agent:
        until = time.time() + LIMIT
        while not list(parts_of(out).glob("layer-*.pt")):
            assert agent.poll() is None, log.read_text()
            assert time.time() < until
            time.sleep(0.01)
        os.kill(workers(agent)["1"], signal.SIGKILL)
        assert agent.wait(LIMIT) != 0
    finished = {}
    for path in parts_of(out).glob("layer-*.pt"):
        layer = int(path.stem.removeprefix("layer-"))
        finished[layer] = torch.load(path, weights_only=True)
    assert 0 < len(finished) < 4
    # They are whole.
    for layer, part in finished.items():
        for name, tensor in single[layer].state_dict().items():
            assert torch.equal(part["weights"][name], tensor)
    assert not list(out.rglob("*.safetensors"))
    # Captures can be larger than what is free for the next start.
    assert not list(out.rglob("*.bin"))

    alone = shutil.copytree(out, tmp_path / "alone")
    unfinished = [str(layer) for layer in range(4) if layer not in finished]
    assert run(log, "-m", "lesslib.train", *arguments(out)) == [
        f"rank 0 of 2 on cpu: layers {', '.join(unfinished[0::2]) or 'none'}",
        f"rank 1 of 2 on cpu: layers {', '.join(unfinished[1::2]) or 'none'}",
    ]
    command.main(arguments(alone))
    for kernels in (kernels_of(out), kernels_of(alone)):
        assert same(kernels, single)
        # A layer trained again would have taken another time.
        for layer, part in finished.items():
            curves = kernels.header["curves"][str(layer)]
            assert curves["seconds"] == part["curves"]["seconds"]
    assert not parts_of(out).exists()


SCRIPT = """
    import time, torch, torch.distributed as dist
    from pathlib import Path
    from transformers import LlamaConfig, LlamaForCausalLM
    from lesslib import H2O, less
    from lesslib.evaluate import Window, perplexity
    from lesslib.kernels import Kernels
    from lesslib.ranks import own_device, place
    from lesslib.train import Recipe, train

    def work(folder, over_ranks):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            initializer_range=0.4,
        )
        model = LlamaForCausalLM(config).to(own_device("cpu")).eval()
        recipe = Recipe(kernel_size=4, hidden=8, epochs=2)
        policy = H2O(heavy=3, recent=3)
        path = folder / "k.safetensors"
        texts = torch.randint(64, (6, 40))
        kernels, curves = train(model, policy, texts, recipe, path, {}, validation=2)
        assert path.exists()  # on every rank
        windows = []
        for i, n in enumerate((40, 9, 64, 23, 31, 64, 12, 5)):
            windows.append(Window(i // 3, tuple(torch.randint(64, (n,)).tolist()), n // 2))
        rows = []

        def count(module, args, kwargs):
            rows.append(len(kwargs["input_ids"]))

        model.register_forward_pre_hook(count, with_kwargs=True)
        with less(model, policy, kernels, mode="parallel"):
            scores = perplexity(model, windows, 3, over_ranks)
        return {
            "weights": kernels.state_dict(),
            "validation": curves["0"]["validation"],
            "scores": scores,
            "rows": rows,
        }

    def save_late(*args):
        time.sleep(0.5)
        save(*args)

    if __name__ == "__main__":
        dist.init_process_group("gloo")  # as a script may that has more to share
        folder = Path(__file__).parent
        save = Kernels.save
        Kernels.save = save_late
        torch.save(work(folder, True), folder / f"found-{place()[0]}.pt")
"""


def test_a_script_under_torchrun_trains_and_scores_as_one_process_does_on_every_rank(tmp_path):
    """With a layer for two ranks: one has none."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    lines = run(tmp_path / "log", script)
    assert lines == ["rank 0 of 2 on cpu: layers 0", "rank 1 of 2 on cpu: layers none"]
    names: dict = {"__name__": "script"}
    exec(compile(script.read_text(), script, "exec"), names)
    alone = names["work"](tmp_path / "alone", False)
    # The same script without torchrun.
    assert names["work"](tmp_path / "alone", True)["scores"] == alone["scores"]
    assert alone["rows"] == [3, 3, 2]
    for rank, rows in enumerate(([3, 2], [3])):
        result = torch.load(tmp_path / f"found-{rank}.pt", weights_only=False)
        assert result["rows"] == rows
        assert result["validation"] == alone["validation"]
        for name, tensor in alone["weights"].items():
            assert torch.equal(result["weights"][name], tensor)
        assert result["scores"] == alone["scores"]


def test_without_torchrun_torch_distributed_is_not_touched(monkeypatch):
    for name in ("init_process_group", "new_group", "all_gather_object"):
        monkeypatch.setattr(ranks.dist, name, lambda *args, **kwargs: pytest.fail("touched"))
    # As some machines leave it set.
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ranks.place() == (0, 1)
    assert ranks.gather("mine") == ["mine"]
    assert ranks.own_device() is None
    assert ranks.own_device("cuda") == "cuda"


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("0", ""), ("-1", "2"), ("0", "two")])
def test_a_rank_that_cannot_be_is_named_before_anything_is_loaded(rank, world, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setattr(all_layers, "load_model", lambda *args: pytest.fail("loaded"))
    message = f"RANK='{rank}' of WORLD_SIZE='{world}': start with torchrun"
    with pytest.raises(SystemExit, match=message):
        command.main(["--profile", "smoke"])


def test_each_rank_has_a_gpu_of_its_own_or_says_that_there_are_too_few(monkeypatch):
    chosen: list = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert ranks.own_device() == "cuda:1"
    assert ranks.own_device("cuda") == "cuda:1"
    assert chosen == [1, 1]
    assert ranks.own_device("cpu") == "cpu"
    assert ranks.own_device("cuda:0") == "cuda:0"
    assert len(chosen) == 2
    # A pool's threads would begin on the first GPU.
    device = torch.device("cuda:1")
    with share.layer_pool(device) as pool:
        pool.submit(int).result()
    assert chosen[2:] == [device]
    monkeypatch.setenv("LOCAL_RANK", "2")
    message = "LOCAL_RANK=2 on a node with 2 GPUs: use torchrun --nproc-per-node 2, or --device cpu"
    with pytest.raises(ValueError, match=message):
        ranks.own_device()


def test_ranks_that_differ_are_refused_before_they_capture_anything(models, tmp_path, monkeypatch):
    monkeypatch.setattr(all_layers, "place", lambda: (1, 2))
    monkeypatch.setattr(parts, "gather", lambda mine: [("other windows", set()), mine])
    monkeypatch.setattr(share, "capture_layers", lambda *args, **kwargs: pytest.fail("captured"))
    model = models("llama-grouped")
    policy = H2O(heavy=3, recent=3)
    windows = torch.zeros(6, 40, dtype=torch.long)
    message = "rank 1 has another model, recipe or text than rank 0: give all the same arguments"
    with pytest.raises(ValueError, match=message):
        train(model, policy, windows, Recipe(), tmp_path / "k.safetensors", {})


def test_only_rank_0_moves_the_bar(monkeypatch, tmp_path):
    monkeypatch.setenv("LESS_PROGRESS", str(tmp_path / "progress.json"))
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        progress(f"of rank {rank}", 1, 2)
    assert json.loads((tmp_path / "progress.json").read_text()) == ["of rank 0 1/2"]
