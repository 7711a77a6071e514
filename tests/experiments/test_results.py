"""Recorded results: whole or not at all, computed once, resumed, and refused when no good."""

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lesslib.experiments import Experiment, Point
from lesslib.experiments.experiment import Twin
from lesslib.experiments.kernel_size import KernelSize
from lesslib.experiments.language_modeling import LanguageModeling
from lesslib.experiments.seeds import Seeds
from lesslib.profiles import results_dir
from lesslib.reporting.results import cache_key, load, manifest
from lesslib.util import files
from lesslib.util.files import write_bytes, write_json, write_torch
from lesslib.util.paths import ROOT
from lesslib.util.progress import progress

DATA = [{"name": "text", "sha256": "ab"}]
POINTS = {"one": {"x": 1}, "two": {"x": 2}, "three": {"x": 3}}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name in ("LESS_LEDGER", "LESS_FROM_RESULTS", "LESS_PROGRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LESS_RESULTS", str(tmp_path / "results"))
    return tmp_path


class Squares(Experiment):
    """x -> x * x, noting its calls; raises at `fail`. What is `shared` goes to processes."""

    name = "exp"

    def __init__(self, points=POINTS, seed=0, fail=None, shared=(), **attributes):
        super().__init__("tiny", seed)
        self.parameters = points
        self.fail = fail
        self.shared = shared
        self.calls = []
        self.data = attributes.pop("data", DATA)
        self.version = attributes.pop("version", 1)
        self.together = attributes.pop("together", ())
        assert not attributes

    def points(self):
        return [Point(key, parameters) for key, parameters in self.parameters.items()]

    def sources(self):
        return self.data

    def may_be_shared(self, point):
        return point.key in self.shared

    def compute(self, point):
        x = point.parameters["x"]
        if x == self.fail:
            raise RuntimeError("interrupted")
        self.calls.append(x)
        return {"square": x * x}


def squares(record):
    return {p: e["square"] for p, e in record["points"].items()}


# ---------------------------------------------------------------- sweeps
def test_points_are_computed_once_and_carry_what_they_depend_on():
    first = Squares()
    again = Squares()
    record = first.run()
    assert first.calls == [1, 2, 3]
    assert squares(record) == {"one": 1, "two": 4, "three": 9}
    assert record["points"]["two"]["parameters"] == {"x": 2}
    assert (record["manifest"]["data"], record["manifest"]["seed"]) == (DATA, 0)
    assert again.run() == record == load("exp", "tiny")
    assert again.calls == []


def test_an_interrupted_sweep_keeps_what_is_finished_and_resumes():
    first = Squares(fail=3)
    second = Squares()
    with pytest.raises(RuntimeError, match="interrupted"):
        first.run()
    assert squares(load("exp", "tiny")) == {"one": 1, "two": 4}
    assert squares(second.run()) == {"one": 1, "two": 4, "three": 9}
    assert second.calls == [3]


class Doubled(Squares):
    """Measures the same at `one` and `two` as Squares on `data_of_twin`."""

    name = "doubled"
    data_of_twin = DATA

    def twin(self, point):
        if point.key == "three":
            return None
        return Twin(Squares(data=self.data_of_twin), point.key)


def test_what_another_experiment_has_measured_is_taken_where_it_is_up_to_date():
    Squares({"one": {"x": 1}}).run()
    seconds = load("exp", "tiny")["points"]["one"]["seconds"]
    experiment = Doubled()
    record = experiment.run()
    # `two` was not there, `three` has no twin
    assert experiment.calls == [2, 3]
    assert squares(record) == {"one": 1, "two": 4, "three": 9}
    assert record["points"]["one"]["seconds"] == seconds
    assert set(record["points"]["one"]) == set(record["points"]["two"])
    assert Doubled().run() == record


def test_what_another_experiment_measured_on_other_data_or_elsewhere_is_not_taken(
    home, monkeypatch
):
    Squares().run()
    stale = Doubled()
    stale.data_of_twin = [DATA[0] | {"sha256": "another"}]
    stale.run()
    assert stale.calls == [1, 2, 3]
    # as in a clone, whose recorded points this machine did not compute
    (home / "results/tiny/doubled.json").unlink()
    monkeypatch.setenv("LESS_LEDGER", str(home / "ledger.json"))
    cloned = Doubled()
    cloned.run()
    assert cloned.calls == [1, 2, 3]


def test_points_that_are_the_same_in_two_experiments_are_computed_once():
    taken = {}
    for experiment in (KernelSize("tiny"), Seeds("tiny"), LanguageModeling("tiny")):
        taken[experiment.name] = []
        for point in experiment.points():
            twin = experiment.twin(point)
            if twin is None:
                continue
            points = {other.key: other for other in twin.experiment.points()}
            if twin.key in points:
                assert points[twin.key].method == point.method
                taken[experiment.name].append(point.key)
    assert taken == {
        "kernel_size": ["2%/8/Baseline+", "2%/8/LESS (2%)", "5%/8/Baseline+", "5%/8/LESS (5%)"],
        "seeds": ["topics-heldout/0", "summary/0", "sentence/0", "tellings/0"],
        "language_modeling": [
            "topics-heldout/Full",
            "topics-heldout/5%/Baseline",
            "topics-heldout/5%/Baseline+",
        ],
    }


linux = pytest.mark.skipif(sys.platform != "linux", reason="points are shared on Linux alone")


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


class Meeting(Squares):
    """x squared, who computed it and with how many threads. 2 and 3 wait for each other."""

    def compute(self, point):
        x = point.parameters["x"]
        folder = results_dir("tiny")
        (folder / f"{x}.begun").touch()
        met = x == 1 or wait_until(
            lambda: all((folder / f"{other}.begun").exists() for other in (2, 3))
        )
        return {"square": x * x, "pid": os.getpid(), "threads": torch.get_num_threads(), "met": met}


@linux
@pytest.mark.usefixtures("two_threads")
def test_points_that_may_be_shared_are_computed_at_the_same_time_and_the_others_here():
    points = Meeting(shared=("two", "three")).run()["points"]
    assert squares({"points": points}) == {"one": 1, "two": 4, "three": 9}
    assert points["one"]["pid"] == os.getpid() not in (points["two"]["pid"], points["three"]["pid"])
    assert points["two"]["pid"] != points["three"]["pid"]
    assert [points[p]["threads"] for p in ("one", "two", "three")] == [2, 1, 1]
    assert points["two"]["met"]
    assert points["three"]["met"]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("threads", "points"), [(1, POINTS), (2, {"one": {"x": 1}})])
def test_one_thread_or_one_point_is_not_shared(threads, points):
    torch.set_num_threads(threads)
    experiment = Squares(points, shared=tuple(points))
    experiment.run()
    # In this process, or the calls would be another's.
    assert experiment.calls == [p["x"] for p in points.values()]


@linux
@pytest.mark.usefixtures("two_threads")
def test_a_shared_point_that_fails_is_raised_and_what_ended_before_is_kept():
    with pytest.raises(RuntimeError, match="interrupted"):
        Squares(fail=3, shared=("two", "three")).run()
    assert squares(load("exp", "tiny"))["one"] == 1
    assert "three" not in load("exp", "tiny")["points"]
    again = Squares(shared=tuple(POINTS))
    assert squares(again.run()) == {"one": 1, "two": 4, "three": 9}


class Products(Squares):
    """x * y, the points of one x at once, and how many these were."""

    def compute_together(self, points):
        values = []
        for point in points:
            x = point.parameters["x"]
            values.append({"square": x * point.parameters.get("y", 0), "of": len(points)})
        return values


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("is_shared", [False, True])
def test_points_that_differ_in_some_parameters_alone_are_computed_together(is_shared):
    points = {f"{x}{y}": {"x": x, "y": y} for x in (1, 2) for y in (3, 4)} | {"1": {"x": 1}}
    shared = tuple(points) if is_shared else ()
    record = Products(points, shared=shared, together=("y",)).run()
    found = {name: (p["square"], p["of"]) for name, p in record["points"].items()}
    assert found == {"13": (3, 3), "14": (4, 3), "1": (0, 3), "23": (6, 2), "24": (8, 2)}
    assert all(p["parameters"] == points[name] for name, p in record["points"].items())
    more = Products(points | {"15": {"x": 1, "y": 5}}, together=("y",)).run()
    # What is recorded is not computed again.
    assert more["points"]["15"]["of"] == 1


def test_fewer_values_than_points_are_refused():
    class Short(Squares):
        def compute_together(self, points):
            return [{"square": 1}]

    with pytest.raises(ValueError, match="shorter"):
        Short({"a": {"x": 1, "y": 1}, "b": {"x": 1, "y": 2}}, together=("y",)).run()


def test_what_a_shared_point_needs_is_made_here_before_processes_begin():
    """Kernels are trained once, by the parent; of points that are not shared, when computed."""

    class Prepared(Squares):
        def prepare(self, point):
            assert self.calls == []
            prepared.append(point.key)

    prepared = []
    Prepared(shared=("two", "three")).run()
    assert prepared == ["two", "three"]


class Dying(Squares):
    def compute(self, point):
        os.kill(os.getpid(), signal.SIGKILL)


@linux
@pytest.mark.usefixtures("two_threads")
def test_a_process_that_dies_is_an_error_that_says_what_to_do():
    with pytest.raises(
        RuntimeError, match=r"a process that computed a point died.*OMP_NUM_THREADS=1"
    ):
        Dying(shared=tuple(POINTS)).run()


@linux
@pytest.mark.usefixtures("two_threads")
def test_processes_that_share_points_end_with_their_parent(home):
    code = """
import os, sys, time
import torch
from pathlib import Path
from lesslib.experiments import Experiment, Point
from lesslib.experiments.experiment import Twin
from lesslib.experiments.kernel_size import KernelSize
from lesslib.experiments.language_modeling import LanguageModeling
from lesslib.experiments.seeds import Seeds
torch.set_num_threads(2)
class Sleeping(Experiment):
    name = "exp"
    shares_points = True
    def points(self):
        return [Point("one", {"x": 1}), Point("two", {"x": 2})]
    def sources(self):
        return []
    def compute(self, point):
        Path(sys.argv[1], f"{point.key}.pid").write_text(str(os.getpid()))
        time.sleep(600)
Sleeping("tiny").run()
"""
    parent = subprocess.Popen([sys.executable, "-c", code, str(home)], cwd=ROOT)
    try:
        assert wait_until(lambda: len([p for p in home.glob("*.pid") if p.read_text()]) == 2)
    finally:
        parent.kill()
        parent.wait()
    pids = [int(p.read_text()) for p in home.glob("*.pid")]
    assert wait_until(
        lambda: (
            not any(
                Path(f"/proc/{pid}/cmdline").is_file() and Path(f"/proc/{pid}/cmdline").read_bytes()
                for pid in pids
            )
        )
    )


def wait_until(holds, seconds=60):
    deadline = time.time() + seconds
    while not (found := holds()) and time.time() < deadline:
        time.sleep(0.05)
    return found


def test_every_part_of_a_points_identity_recomputes_it():
    Squares().run()
    changes = [
        ({"points": {**POINTS, "two": {"x": 5}}}, [5]),
        ({"points": {**POINTS, "four": {"x": 4}}}, [2, 4]),
        ({"seed": 1}, [1, 2, 3]),
        ({"seed": 1, "data": [{"sha256": "cd"}]}, [1, 2, 3]),
        ({"seed": 1, "data": [{"sha256": "cd"}], "version": 2}, [1, 2, 3]),
    ]
    for change, calls in changes:
        experiment = Squares(**change)
        experiment.run()
        assert experiment.calls == calls, change


def test_a_cache_key_does_not_depend_on_order():
    one = cache_key({"a": 1, "b": 2}, 0, [{"sha256": "x"}, {"sha256": "y"}], 1)
    assert one == cache_key({"b": 2, "a": 1}, 0, [{"sha256": "y", "name": "n"}, {"sha256": "x"}], 1)


def test_with_a_ledger_only_points_that_this_machine_computed_count(home, monkeypatch):
    # As committed by somebody else.
    Squares().run()
    monkeypatch.setenv("LESS_LEDGER", str(home / "ledger.json"))
    halfway = Squares(fail=2)
    rest = Squares()
    nothing = Squares()
    with pytest.raises(RuntimeError, match="interrupted"):
        halfway.run()
    # Those not yet recomputed stay recorded.
    assert squares(load("exp", "tiny")) == {"one": 1, "two": 4, "three": 9}
    assert squares(rest.run()) == {"one": 1, "two": 4, "three": 9}
    nothing.run()
    assert (halfway.calls, rest.calls, nothing.calls) == ([1], [2, 3], [])
    monkeypatch.delenv("LESS_LEDGER")
    nothing.run()
    assert nothing.calls == []


@pytest.mark.parametrize("content", ["", "[", "{}"])
def test_a_damaged_ledger_is_named_with_the_fix(home, monkeypatch, content):
    (home / "ledger.json").write_text(content)
    monkeypatch.setenv("LESS_LEDGER", str(home / "ledger.json"))
    with pytest.raises(ValueError, match=r"ledger\.json is damaged .*delete it"):
        Squares().run()


def test_from_results_computes_nothing_and_names_what_is_missing(monkeypatch):
    monkeypatch.setenv("LESS_FROM_RESULTS", "1")
    whole = Squares()
    with pytest.raises(
        FileNotFoundError,
        match=r"exp\.json does not hold one, two, three: run once without --from-results",
    ):
        whole.run()
    monkeypatch.delenv("LESS_FROM_RESULTS")
    Squares({"one": {"x": 1}, "two": {"x": 2}}).run()
    monkeypatch.setenv("LESS_FROM_RESULTS", "1")
    with pytest.raises(FileNotFoundError, match="does not hold three:"):
        whole.run()
    part = Squares({"one": {"x": 1}})
    monkeypatch.setattr(part, "sources", lambda: pytest.fail("data were loaded"))
    assert part.run()["points"]["one"]["square"] == 1
    assert part.calls == whole.calls == []


@pytest.mark.parametrize("content", [b"{", b"", b"[1]", b"{}", b'{"points": 3}', b"\xff\xfe"])
def test_a_damaged_file_is_named_with_the_fix(content):
    path = results_dir("tiny") / "exp.json"
    write_bytes(path, content)
    experiment = Squares()
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(path))} is damaged .*git checkout, or delete it"
    ):
        experiment.run()
    assert experiment.calls == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_and_the_file_stays(value):
    record = Squares({"one": {"x": 1}}).run()
    infinite = Squares()
    infinite.compute = lambda point: {"square": [value]}
    with pytest.raises(
        ValueError, match=r"exp\.json is left as it was: a new value is NaN or infinite"
    ):
        infinite.run()
    assert load("exp", "tiny") == record


def test_a_results_folder_that_cannot_be_written_is_said_before_compute(home, monkeypatch):
    (home / "file").write_text("not a folder")
    monkeypatch.setenv("LESS_RESULTS", str(home / "file"))
    experiment = Squares()
    with pytest.raises(
        OSError, match=r"cannot write .*make that folder writable, or set LESS_RESULTS"
    ):
        experiment.run()
    assert experiment.calls == []


# ---------------------------------------------------------------- files
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_file_and_names_the_fix(home, monkeypatch, code):
    def full(_):
        raise OSError(code, "No space left on device")

    path = home / "some.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr(files.os, "fsync", full)
    for write, value in (
        (write_json, {"a": 2}),
        (write_bytes, b"new"),
        (write_torch, torch.ones(3)),
    ):
        with pytest.raises(
            OSError, match=rf"cannot write {re.escape(str(path))} .*free some space"
        ) as e:
            write(path, value)
        assert e.value.errno == code
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(home.iterdir()) == [path]


def test_an_interrupted_write_leaves_no_scratch_file(home, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    write_bytes(home / "a" / "b.bin", b"old")
    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(home / "a" / "b.bin", b"new")
    assert [p.read_bytes() for p in (home / "a").iterdir()] == [b"old"]


def test_json_is_sorted_and_torch_files_hold_what_was_given(home):
    write_json(home / "a.json", {"b": 1, "a": [1.5, None]})
    assert (home / "a.json").read_text() == '{\n "a": [\n  1.5,\n  null\n ],\n "b": 1\n}\n'
    write_torch(home / "a.pt", {"x": torch.arange(3)})
    assert torch.equal(torch.load(home / "a.pt", weights_only=True)["x"], torch.arange(3))


def test_a_manifest_says_where_a_result_comes_from_and_is_json():
    stamp = json.loads(json.dumps(manifest("tiny", 3, DATA, 1.26), allow_nan=False))
    assert (stamp["profile"], stamp["seed"], stamp["data"], stamp["seconds"]) == (
        "tiny",
        3,
        DATA,
        1.3,
    )
    assert stamp["versions"]["torch"] == torch.__version__
    assert stamp["hardware"]["cores"] >= 1
    assert re.fullmatch(r"unknown|[0-9a-f]{40}(-dirty)?", stamp["commit"])


# ---------------------------------------------------------------- progress
def test_progress_tells_the_runner_the_point_and_the_loop_inside_it(home, monkeypatch):
    file = home / "progress.json"
    seen = []
    monkeypatch.setenv("LESS_PROGRESS", str(file))

    class Looping(Squares):
        def compute(self, point):
            seen.append(json.loads(file.read_text()))
            progress("steps", 2, 5)
            seen.append(json.loads(file.read_text()))
            return super().compute(point)

    Looping({"one": {"x": 1}, "two": {"x": 2}}).run()
    assert seen == [
        ["exp 0/2"],
        ["exp 0/2", "steps 2/5"],
        ["exp 1/2", "about 0 s left"],
        ["exp 1/2", "steps 2/5", "about 0 s left"],
    ]
    assert json.loads(file.read_text()) == ["exp 2/2"]
    with pytest.raises(RuntimeError, match="interrupted"):
        Squares({"three": {"x": 3}}, fail=3).run()
    # Outside a sweep, also after one that failed.
    progress("alone", 1, 4)
    assert json.loads(file.read_text()) == ["alone 1/4"]
