"""The CPU kernels under threads and after a fork: as many threads as torch has, equal results."""

import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from lesslib import H2O
from lesslib.util.paths import ROOT

pytest.importorskip("numba", reason="numba is not installed: the torch forms serve")

from lesslib.ops import cpu
from lesslib.ops.blocks import NEVER
from lesslib.ops.cpu import common
from lesslib.ops.slots import Slots

RULE = H2O(8, 8).rule()


@pytest.fixture
def two_threads(monkeypatch):
    """Torch is set to two threads, and a few rows are worth one."""
    monkeypatch.setattr(common, "WORTH_A_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def results(seed):
    """What a sequence of steps and a few decode steps give."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(3, 4, 40, 16, generator=generator)
    k = torch.randn(3, 2, 40, 16, generator=generator)
    v = torch.randn(3, 2, 40, 16, generator=generator)
    is_real = torch.ones(3, 40, dtype=torch.bool)
    times, part = cpu.sequence_of_steps(RULE, q, k, v, 16, is_real, 0.25)
    slots = Slots.empty(k, v, 16)
    outputs = []
    for t in range(40):
        now = slice(t, t + 1)
        token = (q[:, :, now], k[:, :, now], v[:, :, now])
        outputs.append(cpu.decode_step(RULE, *token, slots, (), None, 0.25).output)
    return [times, part.output, torch.cat(outputs, 2), slots.score]


def same(got, want):
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_rows_are_shared_over_the_threads_of_torch(two_threads, monkeypatch):
    names = set()
    begun = threading.Barrier(2, timeout=10)

    def kernel(first, last, *arguments):
        begun.wait()
        names.add(threading.current_thread().name)

    common.over_rows(kernel, 2)
    assert len(names) == 2
    assert threading.current_thread().name in names
    names.clear()
    begun = threading.Barrier(1)
    torch.set_num_threads(1)
    common.over_rows(kernel, 2)
    assert names == {threading.current_thread().name}


def test_one_thread_and_two_give_the_same(two_threads):
    shared = results(0)
    torch.set_num_threads(1)
    assert same(shared, results(0))
    assert (shared[0] < NEVER).any()


def test_two_threads_of_python_may_call_kernels_at_once(two_threads):
    wanted = [results(seed) for seed in range(2)]
    found = [[], []]

    def work(seed):
        for _ in range(10):
            found[seed].append(results(seed))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    for seed in range(2):
        assert len(found[seed]) == 10
        assert all(same(result, wanted[seed]) for result in found[seed])


# In a process of its own: pytest's workers have threads, which do not survive a fork.
FORKED = """
    import os
    import sys
    import torch
    sys.path.insert(0, "tests/ops")
    from test_cpu_threads import common, results, same

    common.WORTH_A_THREAD = 1
    torch.set_num_threads(2)
    wanted = results(0)
    child = os.fork()
    if child == 0:
        os._exit(0 if same(results(0), wanted) else 3)
    status = os.waitpid(child, 0)[1]
    # the parent goes on as before
    assert same(results(0), wanted)
    print(os.waitstatus_to_exitcode(status), len(common.IDLE))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_kernels_run_in_a_forked_child():
    assert said_by(FORKED) == ["0", "1"]


# OMP_NUM_THREADS holds for kernels, too, as for torch.
ONE_THREAD = """
    import sys
    sys.path.insert(0, "tests/ops")
    from test_cpu_threads import common, results

    common.WORTH_A_THREAD = 1
    results(0)
    print(len(common.IDLE))
"""


def test_omp_num_threads_holds():
    assert said_by(ONE_THREAD, OMP_NUM_THREADS="1") == ["0"]


def said_by(script, **environment):
    """The words that a script prints, run with `environment`."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.split()
