"""Run a function on several ranks from inside a test.

`run_on_ranks(fn, world_size, *args)` calls the module-level function `fn` on ranks 0 .. world_size - 1, each in its own
process, and returns the results by rank. The processes are started at the first call and reused until the tests end,
since importing torch and megatron-core takes longer than most tests. Every call gets a fresh process group.

The ranks are on the CPU over gloo, so that a result does not depend on the machine, unless MINITRON_TEST_DEVICE says
otherwise: `cuda` (a GPU each over NCCL; what needs more GPUs than there are is skipped) or `stand-in` (one GPU's, on
the CPU, where code that mixes up the devices fails all the same: tests/device_stand_in.py).
"""

import atexit
import contextlib
import itertools
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests import warm

REPOSITORY = Path(__file__).resolve().parents[2]
MAX_WORLD_SIZE = 8
START_TIMEOUT = 300.0  # seconds for a worker to import torch and megatron-core on a busy machine
LEAVE_TIMEOUT = 10.0  # seconds for a worker to end once the tests have
GRACE = 1.0  # seconds that the other ranks get to report, once one has failed
DUMP_WAIT = 0.5  # seconds for faulthandler to write its dump
DEVICE_VARIABLE = "MINITRON_TEST_DEVICE"
DEVICES = ("cpu", "stand-in", "cuda")


def test_device() -> str:
    """Where ranks run, as the environment says: one of DEVICES."""
    device = os.environ.get(DEVICE_VARIABLE) or "cpu"
    if device not in DEVICES:
        raise ValueError(f"{DEVICE_VARIABLE} is {device!r}; it must be one of {', '.join(DEVICES)}")
    return device


test_device.__test__ = False  # type: ignore[attr-defined]


class RankError(RuntimeError):
    """A rank failed, died or did not finish in time; the message holds the rank's own traceback.

    `rank` is the rank that failed first (None after a timeout); `__cause__` is the original exception if it could be
    pickled.
    """

    def __init__(self, message: str, rank: int | None = None):
        super().__init__(message)
        self.rank = rank


@dataclass
class _Worker:
    process: subprocess.Popen[bytes] | warm.Process
    connection: Connection
    log: Path

    def signal_all(self, number: int) -> None:
        """Signal the worker and what it started: it leads a session of its own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal_all(signal.SIGKILL)
        self.process.wait()
        self.connection.close()

    def written_since(self, offset: int, limit: int = 6000) -> str:
        """What this worker wrote to stdout and stderr (and faulthandler's dump) after `offset` bytes, its end."""
        with self.log.open("rb") as log:
            log.seek(offset)
            return log.read()[-limit:].decode(errors="replace").strip()


def _start_worker(folder: Path, number: int, device: str) -> _Worker:
    ours, theirs = Pipe(duplex=True)
    log = folder / f"worker_{number}.log"
    environment = dict(os.environ)
    environment.update(
        OMP_NUM_THREADS="1",
        MKL_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        PYTHONPATH=os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
        PYTHONUNBUFFERED="1",
    )
    environment[DEVICE_VARIABLE] = device
    if device != "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    module, given = "tests.distributed.rank_worker", theirs.fileno()
    process: subprocess.Popen[bytes] | warm.Process
    if device == "cuda":
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", module, str(given)],
                pass_fds=[given],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
                env=environment,
                start_new_session=True,
            )
    else:
        process = warm.start(module, [], output=log, env=environment, pass_fds=(given,))
    theirs.close()
    return _Worker(process, ours, log)


class _Pool:
    def __init__(self, device: str) -> None:
        from torch.distributed import TCPStore

        self.device = device
        self.folder = Path(tempfile.mkdtemp(prefix="ranks_"))
        self.workers: list[_Worker] = []
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.calls = itertools.count()
        self.started = itertools.count()
        atexit.register(self.close)

    def close(self) -> None:
        for worker in self.workers:
            worker.connection.close()  # it leaves by itself, and coverage is written
        for worker in self.workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(timeout=LEAVE_TIMEOUT)
            worker.kill()
        self.workers.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def require(self, world_size: int) -> list[_Worker]:
        """The first `world_size` workers, alive; starts what is missing, all at once."""
        self.workers = [worker for worker in self.workers if worker.process.poll() is None]
        fresh = [
            _start_worker(self.folder, next(self.started), self.device) for _ in range(world_size - len(self.workers))
        ]
        deadline = time.monotonic() + START_TIMEOUT
        for worker in fresh:
            try:
                ready = worker.connection.poll(max(0.0, deadline - time.monotonic())) and worker.connection.recv_bytes()
            except (EOFError, OSError):
                ready = b""
            if not ready:
                written = worker.written_since(0)
                for other in fresh:
                    other.kill()
                raise RankError(f"a worker process did not start\n{written}")
        self.workers += fresh
        return self.workers[:world_size]

    @staticmethod
    def release(worker: _Worker) -> None:
        """Tell a worker that has reported that it may take its process group down."""
        with contextlib.suppress(OSError):
            worker.connection.send_bytes(pickle.dumps({}))

    def discard(self, workers: list[_Worker]) -> None:
        for worker in workers:
            worker.kill()
        self.workers = [worker for worker in self.workers if worker not in workers]


_pools: dict[str, _Pool] = {}


def _shortened(text: str, limit: int = 8000) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]}\n[...]\n{text[-limit // 2 :]}"


def _receive(worker: _Worker) -> dict[str, Any]:
    """One rank's report: {"time", "result"} or {"time", "traceback", "exception"}."""
    try:
        report: dict[str, Any] = pickle.loads(worker.connection.recv_bytes())
    except (EOFError, OSError):  # the process died: nothing but its exit code and its log can say why
        code = worker.process.wait()
        # Before all others: what its peers report is that it is gone.
        report = {"time": 0.0, "traceback": f"the process ended with exit code {code}", "exception": None}
    return report


def _collect(workers: list[_Worker], timeout: float) -> dict[int, dict[str, Any]]:
    """Reports by rank: all of them, or those that came before `timeout` or within GRACE after the first failure."""
    reports: dict[int, dict[str, Any]] = {}
    deadline = time.monotonic() + timeout
    while len(reports) < len(workers):
        waiting = {worker.connection: rank for rank, worker in enumerate(workers) if rank not in reports}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            rank = waiting[connection]  # type: ignore[index]
            reports[rank] = _receive(workers[rank])
            if "traceback" in reports[rank]:
                deadline = min(deadline, time.monotonic() + GRACE)
    return reports


def _where(workers: list[_Worker], ranks: list[int], offsets: list[int]) -> str:
    """Where the given ranks stand: every thread's Python stack."""
    for rank in ranks:
        workers[rank].signal_all(signal.SIGUSR2)
    time.sleep(DUMP_WAIT)
    return "\n".join(f"--- rank {rank} stands at:\n{workers[rank].written_since(offsets[rank])}" for rank in ranks)


def _check_devices(device: str, world_size: int) -> None:
    """Skip the test where there are fewer GPUs than ranks."""
    import pytest
    import torch

    if (torch.cuda.device_count() if device == "cuda" else 1) < world_size:
        pytest.skip(f"needs {world_size} GPUs")


def run_on_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    device: str | None = None,
    **kwargs: Any,
) -> list:
    """Call `fn(*args, **kwargs)` on `world_size` ranks of a fresh process group and return the results by rank.

    `device`: one of DEVICES; None: what the environment says.

    `fn` is a function of a module that can be imported from the repository's root (a test module can). Arguments and
    results are pickled; tensors in a result come back detached, on the CPU. RANK, LOCAL_RANK, WORLD_SIZE,
    LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set as torchrun sets them; every call starts from the same seeds,
    and afterwards the process group and megatron-core's global state are taken down. Asserts in `fn` are not rewritten
    by pytest: give them a message, or return the numbers and compare them in the test.

    Raises RankError with the traceback of the rank that failed first (ranks left waiting in a collective are killed
    and replaced at the next call), or, after `timeout` seconds, with the place where each unfinished rank stands.
    """
    if not 1 <= world_size <= MAX_WORLD_SIZE:
        raise ValueError(f"world_size is {world_size}; run_on_ranks takes 1 to {MAX_WORLD_SIZE}")
    if "." in fn.__qualname__:
        raise ValueError(f"{fn.__qualname__} is not a module-level function: workers import it by name")
    device = device or test_device()
    if device != "cpu":
        _check_devices(device, world_size)
    if device not in _pools:
        _pools[device] = _Pool(device)
    pool = _pools[device]
    workers = pool.require(world_size)
    offsets = [worker.log.stat().st_size for worker in workers]
    call = {
        "function": (fn.__module__, fn.__qualname__),
        "world_size": world_size,
        "store": (pool.store.host, pool.store.port, next(pool.calls)),
        "timeout": timeout,
    }
    arguments = pickle.dumps((args, kwargs))
    for rank, worker in enumerate(workers):
        worker.connection.send_bytes(pickle.dumps({**call, "rank": rank, "arguments": arguments}))

    reports = _collect(workers, timeout)
    for rank in reports:
        pool.release(workers[rank])
    failed = sorted((report["time"], rank) for rank, report in reports.items() if "traceback" in report)
    if not failed and len(reports) == world_size:
        return [reports[rank]["result"] for rank in range(world_size)]
    missing = [rank for rank in range(world_size) if rank not in reports]
    where = _where(workers, missing, offsets) if missing else ""
    dead = [rank for _, rank in failed if workers[rank].process.poll() is not None]
    written = workers[failed[0][1]].written_since(offsets[failed[0][1]]) if failed else ""
    pool.discard([workers[rank] for rank in {*missing, *dead}])
    if not failed:
        raise RankError(f"{fn.__qualname__}: ranks {missing} not done after {timeout:g} s\n{where}")
    rank = failed[0][1]
    message = [f"{fn.__qualname__} failed on rank {rank} of {world_size}:\n{_shortened(reports[rank]['traceback'])}"]
    message += [f"--- then rank {r}: {reports[r]['traceback'].strip().splitlines()[-1]}" for _, r in failed[1:]]
    message += [f"--- rank {rank} had written:\n{written}"] if written else []
    raise RankError("\n".join([*message, where]), rank) from reports[rank]["exception"]
