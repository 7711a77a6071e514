"""`python -m lesslib.bench peers`: the same loads by kvpress, in an environment of its own.

kvpress' DecodingPress compresses a cache every few steps; between compressions it grows. A
LessCache evicts at every step, and its bytes are flat. Both hold the same budget of tokens, write
as many tokens with the same random model, and take turns: the peer in a fresh process, ours here.
Open `measure_peers` for one load; peer_process.py is what runs over there.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lesslib.bench import peer_environment
from lesslib.bench.latency import WARM_UP
from lesslib.bench.load import Load, Loads
from lesslib.bench.loads import SHORT_PROMPT, Columns, print_cells, spread, total_seconds
from lesslib.bench.record import BenchmarkRecord, when, where
from lesslib.bench.served_model import ServedModel, held_bytes
from lesslib.bench.shapes import CONTEXT, MODELS
from lesslib.bench.timing import now
from lesslib.util.paths import ROOT
from lesslib.util.progress import clear_context, progress, set_context

SCRIPT = Path(__file__).with_name("peer_process.py")
# where it finds the little of lesslib that it needs
PATH = str(ROOT)
# The first compresses the prompt as well, as ours does; the second leaves it whole until its first
# compression.
PRESSES = ("PrefillDecodingPress", "DecodingPress")
OURS = ("Baseline", "LESS")
MODELS_MEASURED = ("12x768", "smollm2-135m")
LENGTHS = ("2048+256",)
# logits of one model in two versions of transformers
TOLERANCE = 1e-3


@dataclass(frozen=True)
class PeersCase(Loads):
    """What `peers` measures: `methods` here, and `presses` that compress every `interval` steps.

    10 steps are those of the example in kvpress' README.
    """

    presses: tuple[str, ...] = PRESSES
    interval: int = 10


@dataclass
class Answers:
    """What the runs of one method took, and the bytes that its cache held.

    After the prompt and after every token but the last, which is written and never read.
    """

    prompt_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    held: list[int] = field(default_factory=list)

    def add(self, took: dict[str, Any]) -> None:
        self.prompt_s.append(round(took["prompt"], 4))
        self.decode_s.append(round(took["decode"], 4))
        self.held = took["bytes"]

    def summary(self) -> dict[str, Any]:
        row: dict[str, Any] = {"prompt_s": self.prompt_s, "decode_s": self.decode_s}
        row["seconds"] = round(statistics.median(total_seconds(row)), 4)
        row["bytes"] = self.held
        return row


# ---------------------------------------------------------------------- over there, and here
class PeerProcess:
    """The peer at work in its own environment: a process that answers line by line."""

    def __init__(self, python: Path, served: ServedModel, weights: Path):
        self.budget = served.load.budget
        # the script alone, not what lies beside it: -P
        command = [str(python), "-P", str(SCRIPT)]
        environment = os.environ | {"PYTHONPATH": PATH}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        model = MODELS[served.load.model]
        self.versions = self.ask(
            {
                "config": model | {"max_position_embeddings": CONTEXT},
                "weights": str(weights),
                "threads": torch.get_num_threads(),
            }
        )

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Send a line, wait for one. Raises RuntimeError where the process ended instead."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        line = ""
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            pass
        if not line:
            raise RuntimeError("the peer's process ended: what it said is printed above")
        return json.loads(line)

    def answer(self, press: str, interval: int, ids: Tensor, generate: int) -> dict[str, Any]:
        """What `answer` of peer_process.py says of one press."""
        return self.ask(
            {
                "method": press,
                "budget": self.budget,
                "interval": interval,
                "ids": ids.tolist(),
                "generate": generate,
            }
        )

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def write_weights(served: ServedModel, path: Path) -> None:
    """The model's weights, for the peer; of tied tables one."""
    weights = served.model.state_dict()
    if served.model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    safetensors.torch.save_file(weights, path)


@torch.no_grad()
def our_answer(served: ServedModel, method: str, ids: Tensor, generate: int) -> dict[str, Any]:
    """What `answer` of peer_process.py says, of a method of ours."""
    cache = served.cache(method)
    decode = 0.0
    with served.attention(method):
        begun = now()
        logits = served.model(ids, past_key_values=cache, logits_to_keep=1).logits
        token = logits[:, -1:].argmax(-1)
        prompt = now() - begun
        held = [held_bytes(method, cache)]
        for _ in range(generate - 1):
            begun = now()
            token = served.model(token, past_key_values=cache).logits.argmax(-1)
            decode += now() - begun
            held.append(held_bytes(method, cache))
    return {"prompt": prompt, "decode": decode, "bytes": held, "first": logits[:, -1, 0].tolist()}


def check_same_model(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raises RuntimeError where the peer's logits after the prompt are not ours."""
    if not torch.allclose(
        torch.tensor(ours["first"]), torch.tensor(theirs["first"]), atol=TOLERANCE
    ):
        raise RuntimeError("the peer's model gives other logits than ours: nothing is compared")


# ---------------------------------------------------------------------- one load
def measure_peers(case: PeersCase, load: Load, python: Path) -> dict[str, Any]:
    """{"methods": rows by method and press, see `Answers.summary`, "peer": its versions}."""
    served = ServedModel(load)
    with tempfile.TemporaryDirectory(prefix="lesslib-peer-") as folder:
        weights = Path(folder) / "model.safetensors"
        write_weights(served, weights)
        peer = PeerProcess(python, served, weights)
        try:
            answers = take_turns(case, served, peer)
        finally:
            peer.close()
    rows = {method: taken.summary() for method, taken in answers.items()}
    return {"methods": rows, "peer": peer.versions}


def take_turns(case: PeersCase, served: ServedModel, peer: PeerProcess) -> dict[str, Answers]:
    """The answers of all methods and presses, after a short one of each that warms up."""
    load = served.load
    answers = {method: Answers() for method in (*case.methods, *case.presses)}
    for run in range(case.runs + 1):
        is_warm_up = run == 0
        progress("runs", run, case.runs + 1)
        ids = served.random_prompt(load.batch)
        generate = load.generate
        if is_warm_up:
            ids = ids[:, :SHORT_PROMPT]
            generate = min(WARM_UP, generate)
        taken = {m: our_answer(served, m, ids, generate) for m in case.methods}
        for press in case.presses:
            taken[press] = peer.answer(press, case.interval, ids, generate)
            check_same_model(taken[case.methods[0]], taken[press])
        if not is_warm_up:
            for method, took in taken.items():
                answers[method].add(took)
    progress("runs", 1, 1)
    return answers


# ---------------------------------------------------------------------- tables
COLUMNS: Columns = (
    ("method", 22),
    ("prompt, s", 24),
    ("answer, s", 24),
    ("both, s", 24),
    ("it / LESS", 10),
)


def course_of_bytes(held: list[int]) -> str:
    """What a cache holds step by step, in words.

    `held`: bytes after the prompt, then after every step.
    """
    if len(set(held)) == 1:
        return f"{_mib(held[0])} MiB at every step"
    compressed = held.index(min(held))
    between = f"{_mib(min(held))} to {_mib(max(held[compressed:]))}"
    if compressed == 0:
        return f"{between} MiB"
    return (
        f"{_mib(held[0])} MiB after the prompt, at most {_mib(max(held))};"
        f" from step {compressed} on {between}"
    )


def _mib(held: int) -> str:
    return f"{held / 2**20:.3f}"


def print_peers(load: Load, entry: dict) -> None:
    """A line of each method's seconds, and one of its cache's bytes."""
    peer = ", ".join(f"{package} {version}" for package, version in entry["peer"].items())
    print(f"{load}, kernels {load.hidden} wide; {where(entry)}; {when(entry)}")
    print(f"the peer: {peer}; KnormPress, every {entry['parameters']['interval']} steps")
    # JSON has lost their order
    rows = {method: entry["methods"][method] for method in entry["parameters"]["methods"]}
    print_cells([title for title, _ in COLUMNS], COLUMNS)
    for method, row in rows.items():
        ratio = f"{row['seconds'] / rows['LESS']['seconds']:.2f}" if "LESS" in rows else ""
        seconds = (row["prompt_s"], row["decode_s"], total_seconds(row))
        print_cells([method, *(spread(values) for values in seconds), ratio], COLUMNS)
    for method, row in rows.items():
        print(f"{method:>22}: cache of {course_of_bytes(row['bytes'])}")
    print(flush=True)


def compare_peers(case: PeersCase, fresh: bool) -> None:
    """Measure every load that is not recorded yet; a table of each.

    Raises PeerMissing where the peer cannot be installed, ValueError for loads that cannot be.
    """
    loads = case.each()
    record = BenchmarkRecord("peers")
    for i, load in enumerate(loads):
        set_context(f"load {i + 1} of {len(loads)}, {load}", "")
        more = {"methods": [*case.methods, *case.presses], "runs": case.runs}
        parameters = asdict(load) | more | {"interval": case.interval}
        entry = None if fresh else record.finished(str(load), parameters)
        if entry is None:
            begun = time.perf_counter()
            value = measure_peers(case, load, peer_environment.peer_python())
            entry = record.write(str(load), parameters, time.perf_counter() - begun, value)
        print_peers(load, entry)
    clear_context()
    print(f"recorded in {record.path}")
