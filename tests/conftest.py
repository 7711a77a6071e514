"""What every test may count on: offline, one thread, the smoke profile, results in a temporary
folder, a fixed seed.
"""

import functools
import os
import shutil
import tempfile
from types import SimpleNamespace

import pytest
import torch

# Before lesslib or transformers are imported, and in the environment itself: notebooks and
# subprocesses see it too.
os.environ.update(
    HF_HUB_OFFLINE="1", LESS_PROFILE="smoke", LESS_RESULTS=tempfile.mkdtemp(prefix="less-tests-")
)
for name in ("LESS_LEDGER", "LESS_PROGRESS", "LESS_FROM_RESULTS"):
    os.environ.pop(name, None)
SESSION_RESULTS = os.environ["LESS_RESULTS"]
torch.set_num_threads(1)


# Seconds of the files that take longest, on two cores. They begin first, so that at the end there
# are short ones for every process; a file that is not here counts as quick.
SECONDS = {
    "tests/ops/test_triton.py": 120,
    "tests/attention/test_cache.py": 60,
    "tests/training/test_ranks.py": 60,
    "tests/house/test_style.py": 45,
    "tests/runner/test_run.py": 45,
    "notebooks/01_low_rank_residuals.ipynb": 30,
    "tests/ops/test_fused.py": 25,
    "notebooks/13_generate.ipynb": 24,
    "tests/experiments/test_downstream.py": 22,
    "notebooks/03_language_modeling.ipynb": 20,
    "tests/small_models/test_pretrain.py": 18,
    "notebooks/07_attention_maps.ipynb": 16,
    "tests/extending/test_a_row_of_ones_own.py": 16,
    "notebooks/02_training_kernels.ipynb": 15,
    "notebooks/00_tour.ipynb": 14,
    "notebooks/04_sparse_policies.ipynb": 14,
    "notebooks/05_classification.ipynb": 14,
    "notebooks/09_prompt_length.ipynb": 14,
    "notebooks/08_kernel_size.ipynb": 12,
    "notebooks/06_summarization.ipynb": 11,
    "tests/attention/test_parallel.py": 11,
    "tests/ops/test_cpu_prepare.py": 10,
    "tests/models/test_models.py": 9,
    "notebooks/10_latency_throughput.ipynb": 8,
    "notebooks/11_breakdown_memory.ipynb": 8,
    "tests/data/test_storyworld.py": 8,
    "tests/house/test_docs.py": 8,
    "notebooks/12_scoreboard.ipynb": 8,
    "tests/hf/test_hf.py": 7,
    "tests/experiments/test_experiments.py": 7,
    "tests/bench/test_command.py": 6,
    "tests/experiments/test_results.py": 6,
    "tests/ops/test_dispatch.py": 6,
}


def pytest_collection_modifyitems(config, items):
    """Order the files, and leave the tests of each in their order."""

    def seconds(item):
        return SECONDS.get(item.path.relative_to(config.rootpath).as_posix(), 0.0)

    items.sort(key=seconds, reverse=True)


def pytest_unconfigure():
    shutil.rmtree(SESSION_RESULTS, ignore_errors=True)


@pytest.fixture(autouse=True)
def _isolated(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LESS_RESULTS", str(tmp_path_factory.mktemp("results")))
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def sequences():
    """A function that draws q, k, v and features phi, psi in float64, and `real` with False where
    `pads` [B] says (left padding).

    The first coordinate weighs every key, later ones more on average: heavy hitters keep
    changing, as they would not with plain noise, where the first tokens hold their scores for
    good.
    """

    def draw(B=2, Hq=4, Hkv=2, S=37, D=5, Dv=4, R=3, pads=None, seed=0, spread=1.0):
        def normal(*size):
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        generator = torch.Generator().manual_seed(seed)
        q, k, v = normal(B, Hq, S, D), normal(B, Hkv, S, D), normal(B, Hkv, S, Dv)
        q[..., 0] = D**0.5
        k[..., 0] = (
            12
            * torch.rand(B, Hkv, S, generator=generator, dtype=torch.float64)
            * torch.linspace(0, 1, S, dtype=torch.float64)
        )
        real = None if pads is None else torch.arange(S) >= torch.tensor(pads)[:, None]
        return SimpleNamespace(
            q=q,
            k=k * spread,
            v=v,
            phi=normal(B, Hq, S, R).abs(),
            psi=normal(B, Hkv, S, R).abs(),
            real=real,
        )

    return draw


@pytest.fixture(scope="module")
def models():
    """A function from an architecture's name in tests/zoo.py to its model, built once for a test
    file.
    """
    from tiny_models import WITH_HYBRID, build

    return functools.cache(lambda name: build(WITH_HYBRID[name]()))


@pytest.fixture
def llama(models):
    return models("llama-grouped")
