"""CPU kernels are compiled once a machine, beforehand, for what models call them with."""

import multiprocessing
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from lesslib.ops import cpu, kernel_cache
from lesslib.ops.cpu import prepare
from lesslib.util.paths import ROOT

pytest.importorskip("numba", reason="numba is not installed")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache folder for compiled kernels."""
    monkeypatch.setattr(kernel_cache, "cache_folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """The dtypes of the examples that are called; nothing is compiled."""
    dtypes = []

    def examples(dtype):
        yield prepare.Example(dtypes.append, (dtype,))

    monkeypatch.setattr(prepare, "examples", examples)
    return dtypes


def test_every_operation_has_an_example():
    operations = set(cpu.__all__) - {"available"}
    operations = {name for name in operations if callable(getattr(cpu, name))}
    shown = {example.operation.__name__ for example in prepare.examples(torch.float32)}
    assert shown == operations


def test_what_is_compiled_is_not_compiled_again(folder, calls, capsys):
    assert not kernel_cache.is_complete(("float32",))
    prepare.prepare()
    assert calls == [torch.float32]
    assert capsys.readouterr().out.startswith("compiling the CPU kernels, once for this machine: ")
    prepare.prepare()
    assert capsys.readouterr().out == ""
    prepare.main(["float32", "float64"])
    assert calls == [torch.float32, torch.float32, torch.float64]
    assert kernel_cache.is_complete(("float32", "float64"))
    assert not kernel_cache.is_complete(("float16",))


def test_an_operation_that_fails_leaves_no_mark(folder, monkeypatch):
    def examples(dtype):
        yield prepare.Example(torch.zeros, (-1,))

    monkeypatch.setattr(prepare, "examples", examples)
    with pytest.raises(RuntimeError):
        prepare.prepare()
    assert not kernel_cache.is_complete(("float32",))


@pytest.mark.parametrize("change", ["NUMBA_CPU_NAME", "processor", "numba"])
def test_another_processor_or_numba_compiles_anew(folder, calls, monkeypatch, change):
    kernel_cache._target.cache_clear()
    prepare.prepare()
    kernel_cache._target.cache_clear()
    assert kernel_cache.is_complete(("float32",))
    if change == "processor":
        monkeypatch.setattr(kernel_cache, "_processor", lambda: ["another"])
    elif change == "numba":
        monkeypatch.setattr(kernel_cache.importlib.metadata, "version", lambda name: "0.1")
    else:
        monkeypatch.setenv(change, "znver3")
    kernel_cache._target.cache_clear()
    try:
        assert not kernel_cache.is_complete(("float32",))
    finally:
        kernel_cache._target.cache_clear()


def wait_for_the_lock(folder, entered):
    kernel_cache.cache_folder = lambda: folder
    with kernel_cache.alone():
        entered.set()


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_one_process_compiles_at_a_time(folder):
    context = multiprocessing.get_context("fork")
    entered = context.Event()
    process = context.Process(target=wait_for_the_lock, args=(folder, entered))
    with kernel_cache.alone():
        process.start()
        assert not entered.wait(0.3)
    assert entered.wait(20)
    process.join()


def test_the_folder_follows_the_sources_and_a_home_that_cannot_be_written(tmp_path, monkeypatch):
    def found():
        kernel_cache.cache_folder.cache_clear()
        return kernel_cache.cache_folder()

    real = kernel_cache.cache_folder()
    try:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        first = found()
        assert first.parent == tmp_path / "cache" / "lesslib"
        assert first.name == real.name
        sources = tmp_path / "cpu"
        sources.mkdir()
        (sources / "steps.py").write_text("changed")
        monkeypatch.setattr(kernel_cache, "SOURCES", sources)
        assert found().name != first.name
        # a home where no folder can be made: a folder that this user alone may write to
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        monkeypatch.setattr(kernel_cache.tempfile, "tempdir", str(tmp_path))
        shared = found()
        assert shared.parent == tmp_path / f"lesslib-{os.getuid()}"
        assert found() == shared
        assert shared.parent.stat().st_mode & 0o077 == 0
        shared.parent.chmod(0o777)
        assert found().parent == tmp_path
        assert found() != found()
    finally:
        kernel_cache.cache_folder.cache_clear()


# What models call the kernels with, beside what is prepared; in a fresh process, for what is
# compiled is kept for the life of one.
USES = """
    import torch
    from numba.core.dispatcher import Dispatcher
    import importlib, pkgutil
    from lesslib import H2O, TOVA, Lambda, LessCache, less
    from lesslib.models import load_kernels, load_model, model_shape
    from lesslib.ops import cpu
    from lesslib.ops.cpu import prepare

    torch.set_num_threads(1)

    def signatures():
        found = set()
        for module in pkgutil.iter_modules(cpu.__path__):
            if module.name.startswith("_"):
                continue
            names = vars(importlib.import_module(f"lesslib.ops.cpu.{module.name}"))
            for name, kernel in names.items():
                if isinstance(kernel, Dispatcher):
                    found |= {(name, str(types)) for types in kernel.signatures}
        return found

    for operation, arguments in prepare.examples(torch.float32):
        operation(*arguments)
    prepared = signatures()
    assert prepared
    model, tokenizer = load_model("pico-llama", "cpu")
    state = load_kernels("pico-llama", "h2o", 0.05)
    ids = torch.randint(3, 4000, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    policies = [H2O(3, 4), H2O(3, 4, scores="full"), Lambda(recent=5, sinks=2), TOVA(7)]
    with torch.no_grad():
        for policy in policies:
            for kernels in (None, state):
                for given in (None, mask):
                    with less(model, policy, kernels):
                        model(ids, attention_mask=given, use_cache=False)
                    if policy.needs_full_rows:
                        continue
                    with less(model):
                        cache = LessCache(model, policy, kernels)
                        model.generate(
                            ids, attention_mask=given, past_key_values=cache, max_new_tokens=4,
                            do_sample=False, eos_token_id=None, pad_token_id=0,
                        )
    print(sorted(signatures() - prepared))
"""


def test_models_call_the_kernels_with_what_is_prepared():
    command = [sys.executable, "-c", textwrap.dedent(USES)]
    environment = os.environ | {"LESS_OPS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
