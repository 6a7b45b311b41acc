"""Processes that start in milliseconds: forked from one that has imported torch and megatron-core already.

`start(module, arguments)` is `python -m module arguments`, without the six seconds of processor time that importing
takes. What is started is a process of its own: with its own session, environment and signals, it ends by itself, and
its exit code is what Python would give. What it cannot show is that the imports work and what they cost: leave one test
of each launcher to start Python itself. Not for CUDA, which a fork does not survive.

The processes are forked by a server, one for each test process, which ends with it.
"""

from __future__ import annotations

import array
import contextlib
import gc
import importlib
import os
import pickle
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = (
    "megatron.core",
    "transformers",
    "minitron_mcore.cli",
    "minitron_mcore.recipe",
    "minitron_mcore.stages.run",
    "minitron_mcore.stages.ablate",
    "minitron_mcore.stages.inspect",
)
START_TIMEOUT = 300.0  # seconds for the server to import all that on a busy machine
# Read while libraries are loaded, which has happened by the time that a process gets its environment.
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}


class Process:
    """The part of subprocess.Popen that tests use."""

    def __init__(self, pid: int, status: int):
        self.pid = pid
        self.returncode: int | None = None
        self._status = status  # the end of a pipe that gives the exit code

    def poll(self) -> int | None:
        return self._take(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._take(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _take(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            code = os.read(self._status, 16)
            os.close(self._status)
            self.returncode = int(code) if code else -signal.SIGKILL  # nothing: the server has gone, and all with it
        return self.returncode


_server: socket.socket | None = None


def _connect() -> socket.socket:
    global _server
    if _server is None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        subprocess.Popen(
            [sys.executable, "-m", "tests.warm", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )
        theirs.close()
        ours.settimeout(START_TIMEOUT)
        _server = ours
    return _server


def start(
    module: str,
    arguments: list[str],
    *,
    output: Path,
    env: dict[str, str] | None = None,
    cwd: Path = ROOT,
    pass_fds: tuple[int, ...] = (),
) -> Process:
    """`python -m module arguments FD ...` in a session of its own, its stdout and stderr in the file `output`; FD are
    the numbers that `pass_fds` have there."""
    server = _connect()
    read_end, write_end = os.pipe()
    with output.open("wb") as log:
        request = {"module": module, "arguments": arguments, "env": dict(os.environ if env is None else env)}
        given = [log.fileno(), write_end, *pass_fds]
        message = pickle.dumps({**request, "cwd": str(cwd)})
        server.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", given))])
    os.close(write_end)
    reply = server.recv(64)
    if not reply:
        raise RuntimeError("the server of warm processes has ended; its output says why")
    return Process(int(reply), read_end)


def _serve(control: socket.socket) -> dict[str, Any]:
    """Fork for every request; report every exit code. Returns in the forked processes alone, with their request."""
    children: dict[int, tuple[int, int]] = {}  # pidfd: pid, the pipe that its exit code goes to
    while True:
        ready, _, _ = select.select([control.fileno(), *children], [], [])
        for pidfd in children.keys() & set(ready):
            pid, status = children.pop(pidfd)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with contextlib.suppress(BrokenPipeError):  # nobody will ask
                os.write(status, str(code).encode())
            os.close(status)
            os.close(pidfd)
        if control.fileno() not in ready:
            continue
        message, received, _, _ = socket.recv_fds(control, 1 << 20, 16)
        if not message:
            os._exit(0)
        log, status, *passed = received
        pid = os.fork()
        if pid == 0:
            for descriptor in (control.detach(), status, *children, *(pipe for _, pipe in children.values())):
                os.close(descriptor)
            return {**pickle.loads(message), "log": log, "fds": passed}
        children[os.pidfd_open(pid)] = (pid, status)
        for descriptor in (log, *passed):
            os.close(descriptor)
        control.send(str(pid).encode())


def _become(request: dict[str, Any]) -> str:
    """Take on what a fresh process would have; returns the module to run."""
    os.setsid()
    for descriptor in (1, 2):
        os.dup2(request["log"], descriptor)
    os.close(request["log"])
    for descriptor in request["fds"]:
        os.set_inheritable(descriptor, True)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]  # as python -m does
    sys.argv[1:] = [*request["arguments"], *map(str, request["fds"])]
    random.seed()
    return str(request["module"])


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron warns about every CUDA library that is not there
        import torch

        torch.set_num_threads(1)
        importlib.import_module("minitron_mcore.runtime.cpu_adapter").install()
        for module in PRELOADED:
            importlib.import_module(module)
    gc.collect()
    gc.freeze()
    module = _become(_serve(control))
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
