"""Kernels of notebooks, forked from one process that has loaded what every notebook imports.

torch, transformers and matplotlib take five seconds to import, and every notebook has a kernel of
its own. So Python's fork server loads them once; a kernel that it forks begins with them in memory,
and with nothing else: no model, no result. jupyter_client starts kernels through a "provisioner",
and `ForkedKernel` is one. Elsewhere than on Linux kernels start as ever.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from importlib.metadata import EntryPoint
from multiprocessing.process import BaseProcess
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

# Not lesslib.experiments: its benchmarks ask for a GPU, and no process may do so before it forks.
PRELOADED = [
    "lesslib.train",
    "lesslib.evaluation",
    "lesslib.reporting.plots",
    "transformers.models.llama.modeling_llama",
    "ipykernel.kernelapp",
]
# What ipykernel sets, too late for a matplotlib that is there before it.
BACKEND = "module://matplotlib_inline.backend_inline"
NAME = "lesslib-forked"


def fork_kernels() -> None:
    """From now on kernels that this process starts are forked.

    The fork server starts with the first, in the environment of that moment.
    """
    if sys.platform != "linux":
        return
    factory = KernelProvisionerFactory.instance()
    place = f"{__name__}:{ForkedKernel.__name__}"
    factory.provisioners[NAME] = EntryPoint(NAME, place, KernelProvisionerFactory.GROUP_NAME)
    factory.default_provisioner_name = NAME
    os.environ.setdefault("MPLBACKEND", BACKEND)
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)


class ForkedKernel(LocalProvisioner):
    """A kernel on this machine whose process the fork server forks."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Start the kernel of the command `cmd`, [python, "-m", "ipykernel_launcher", ...]."""
        context = multiprocessing.get_context("forkserver")
        arguments = cmd[cmd.index("ipykernel_launcher") + 1 :]
        child = context.Process(
            target=run_kernel, args=(arguments, kwargs.get("cwd"), dict(kwargs["env"]))
        )
        child.start()
        process = ForkedProcess(child)
        self.process = process  # type: ignore[assignment]
        self.pid = process.pid
        # It leads a group of its own, see `run_kernel`.
        self.pgid = process.pid
        return self.connection_info


def run_kernel(arguments: list[str], cwd: str | None, environment: dict[str, str]) -> None:
    """In the new process: be the kernel, until it is shut down."""
    # Ctrl-C in the terminal is for the runner alone.
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    if cwd is not None:
        os.chdir(cwd)
    # Processes that cells start begin as they do elsewhere, by this Python's own default.
    multiprocessing.set_start_method(None, force=True)
    threading.Thread(target=end_with_the_runner, daemon=True).start()
    # A kernel without a parent would tell how to connect to it.
    parent = f"--IPKernelApp.parent_handle={os.getppid()}"
    sys.argv = ["ipykernel_launcher", *arguments, parent]

    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance()


def end_with_the_runner() -> None:
    """End this process when the runner is gone, as the fork server lives on while it has kernels.

    A runner that lives shuts its kernels down itself.
    """
    runner = multiprocessing.parent_process()
    assert runner is not None
    runner.join()
    os._exit(1)


class ForkedProcess:
    """A process of multiprocessing, with those methods of subprocess.Popen that Jupyter calls."""

    stdin = stdout = stderr = None

    def __init__(self, process: BaseProcess) -> None:
        self.process = process
        assert process.pid is not None
        self.pid = process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        self.process.join(timeout)
        exit_code = self.process.exitcode
        if exit_code is None:
            raise subprocess.TimeoutExpired("a kernel", timeout or 0.0)
        return exit_code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
