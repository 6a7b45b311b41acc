"""One start-up for a single process, `torchrun` and `srun`: ranks, device, backend, process groups, seeds."""

from __future__ import annotations

import logging
import os
import random
import re
import socket
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy
import torch

from minitron_mcore.errors import InputError
from minitron_mcore.runtime import cpu_adapter
from minitron_mcore.runtime.timeout import collective_timeout

T = TypeVar("T")

MOST_SEED = 2**63 - 1  # torch's generators take 64 bits


@dataclass
class Runtime:
    """Where this process stands. One for each process, passed to every stage."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    stop_signal: int = 0  # that asked to stop in a training's last iteration, which it had ended by then
    _waits: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *words: object) -> None:
        """Print on the first rank alone, at once."""
        if self.is_main:
            print(*words, flush=True)

    def barrier(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier()

    def broadcast(self, value: object) -> object:
        """Any picklable value of the first rank, on every rank (all ranks call)."""
        box = [value]
        if self.world_size > 1:
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def _wait_for_main(self) -> None:
        """Wait on the store, not in a collective: the first rank may work for longer than a collective may take."""
        if self.world_size == 1:
            return
        store = torch.distributed.distributed_c10d._get_default_store()
        self._waits += 1
        key = f"minitron/main/{self._waits}"
        if self.is_main:
            store.set(key, "done")
        while not self.is_main and not store.check([key]):
            time.sleep(0.02)

    def on_main(self, work: Callable[[], T]) -> T:
        """Do `work` on the first rank alone and give its (picklable) result to every rank; all ranks call.

        What `work` raises is raised on every rank, so that none is left waiting: an InputError as it is, anything
        else as a RuntimeError beside the first rank's own.
        """
        result: Any = None
        failure: Exception | None = None
        if self.is_main:
            try:
                result = work()
            except Exception as error:
                failure = error
        self._wait_for_main()
        told = failure if failure is None or isinstance(failure, InputError) else RuntimeError(f"rank 0: {failure}")
        result, told = self.broadcast((result, told))  # type: ignore[misc]
        if failure is not None:
            raise failure
        if told is not None:
            raise told
        return result


def read_environment(environment: dict[str, str]) -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun's variables, else srun's, else a single process.

    Fills MASTER_ADDR and MASTER_PORT into `environment` where SLURM alone started us.
    """
    env = environment
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0"))
    # The step's own number of tasks: inside `salloc`, SLURM_NTASKS is the allocation's.
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and tasks > 1:
        env.setdefault("MASTER_ADDR", _first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", ""))))
        env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 12000))
        return int(env["SLURM_PROCID"]), tasks, int(env.get("SLURM_LOCALID", "0"))
    return 0, 1, 0


def _first_host(node_list: str) -> str:
    """First host of a SLURM node list such as `gpu[003-007,12]-ib,login1`."""
    if "[" in node_list:
        try:
            command = ["scontrol", "show", "hostnames", node_list]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            node_list = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", node_list)  # in a container without scontrol
    return node_list.split(",")[0] or "127.0.0.1"


def start() -> Runtime:
    """Start this process: device, adapter, and the world's process group (NCCL on CUDA, gloo on CPU).

    Every rank calls it once. Model-parallel groups come later, from `parallel.use_layout`, since stages may differ.
    """
    quiet_libraries()
    rank, world_size, local_rank = read_environment(os.environ)  # type: ignore[arg-type]
    if torch.cuda.is_available():
        if torch.cuda.device_count() == 1 and "SLURM_LOCALID" in os.environ:
            local_rank = 0  # --gpus-per-task=1: each task sees its own GPU alone
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"local rank {local_rank} has no GPU of its own: this node shows {torch.cuda.device_count()}; "
                "start at most as many processes a node (--nproc-per-node)"
            )
        torch.cuda.set_device(local_rank)
        device, backend = torch.device("cuda", local_rank), "nccl"
    else:
        cpu_adapter.install()
        device, backend = torch.device("cpu"), "gloo"
    if not torch.distributed.is_initialized():
        if world_size == 1:
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            os.environ.setdefault("MASTER_PORT", str(_free_port()))
        torch.distributed.init_process_group(backend, rank=rank, world_size=world_size, timeout=collective_timeout())
    return Runtime(rank=rank, world_size=world_size, local_rank=local_rank, device=device)


def stop() -> None:
    """Leave the process group; safe to call twice."""
    from minitron_mcore.runtime.parallel import release_layout

    if torch.distributed.is_initialized():
        release_layout()
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def quiet_libraries() -> None:
    """Megatron and torch warn at import about optional parts (Apex, Transformer Engine) that are not needed here."""
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", message=r".*(pynvml|No CUDA|destroy_process_group|is not a CUDA).*")
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"Please use DTensor instead", category=FutureWarning)
    for name in ("megatron", "torch.distributed.elastic", "torch.distributed.checkpoint"):
        logging.getLogger(name).setLevel(logging.ERROR)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy, torch and Megatron's tensor-parallel generators (model-parallel groups must exist).

    Raises InputError for a seed that they cannot take.
    """
    if not 0 <= seed <= MOST_SEED:
        raise InputError(f"seed={seed} must lie between 0 and {MOST_SEED}")
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
