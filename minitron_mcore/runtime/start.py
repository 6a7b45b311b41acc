"""One start-up for a single process, `torchrun` and `srun`: ranks, device, backend, process groups, seeds."""

from __future__ import annotations

import ctypes
import os
import socket
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch.distributed import HashStore
from torch.distributed import distributed_c10d as c10d

from minitron_mcore.errors import InputError
from minitron_mcore.runtime import agree, cpu_adapter
from minitron_mcore.runtime.config import WatchConfig
from minitron_mcore.runtime.interrupt import began
from minitron_mcore.runtime.progress import Bar, progress
from minitron_mcore.runtime.pulse import PULSE
from minitron_mcore.runtime.watchdog import met_in_time, watched
from minitron_mcore.runtime.world import (
    Memory,
    World,
    collective_timeout,
    engine_version,
    grace_seconds,
    host_memory,
    own_interface,
    read_world,
)


@dataclass
class Runtime:
    """Where this process stands. One for each process, passed to every stage."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    local_size: int = 1  # ranks of this node
    stop_signal: int = 0  # why to stop, from a training's last iteration: a signal, or interrupt.EXIT_DURATION
    started: float = field(default_factory=time.monotonic)
    progress_style: str = "auto"  # how it is shown how far long work is (progress.py)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *words: object) -> None:
        """Print on the first rank alone, at once."""
        if self.is_main:
            print(*words, flush=True)

    def warn(self, words: str) -> None:
        """Print a warning on the first rank; nothing where there are no words."""
        if words:
            self.print(f"WARNING: {words}")

    def progress(
        self, total: float | None, unit: str, title: str, *, done: float = 0, lines: bool = True
    ) -> AbstractContextManager[Bar]:
        """A bar on the first rank's terminal, or dated lines in its log, while the `with` lasts (progress.py)."""
        style = self.progress_style if self.is_main else "none"
        return progress(total, unit, title, style=style, done=done, lines=lines)

    def watched(self, watch: WatchConfig) -> AbstractContextManager[None]:
        """Ranks that hang while the `with` lasts end the job; every rank calls (watchdog.py)."""
        return watched(watch, self.rank, self.world_size, self.local_size)

    def barrier(self) -> None:
        if self.world_size > 1:
            PULSE.note("barrier")
            torch.distributed.barrier()

    def hosts(self) -> list[str]:
        """The machine of each rank; every rank calls."""
        own = socket.gethostname()
        return agree.gathered(own) if self.world_size > 1 else [own]

    broadcast = staticmethod(agree.broadcast)
    on_main = staticmethod(agree.on_main)


def start() -> Runtime:
    """Start this process: device, adapter, and the world's process group (NCCL on CUDA, gloo on CPU).

    Every rank calls it once. Model-parallel groups come later, from `parallel.use_layout`, since stages may differ.
    """
    started, world = began(), read_world(os.environ)
    local_rank = world.local_rank
    if torch.cuda.is_available():
        if torch.cuda.device_count() == 1 and "SLURM_LOCALID" in os.environ:
            local_rank = 0  # --gpus-per-task=1: each task sees only its own GPU
        if local_rank >= torch.cuda.device_count():
            rule = f"has no GPU of its own, as this node shows {torch.cuda.device_count()}"
            raise InputError("LOCAL_RANK", local_rank, rule, "start at most that many processes a node")
        torch.cuda.set_device(local_rank)
        device, backend = torch.device("cuda", local_rank), "nccl"
    else:
        cpu_adapter.install()
        device, backend = torch.device("cpu"), "gloo"
    grace_seconds()  # it is looked at when steps are known, and refused now
    if not torch.distributed.is_initialized():
        # A single process meets nobody, so it needs no port, which another process might hold.
        meeting = {"store": HashStore()} if world.address is None else {"init_method": world.address}
        with own_interface(world.size), met_in_time(world.rank):
            torch.distributed.init_process_group(
                backend, rank=world.rank, world_size=world.size, timeout=collective_timeout(), **meeting
            )
    if world.size == 1:
        forget_groups_in_children()
    return Runtime(world.rank, world.size, local_rank, device, world.local_size, started=started)


def stop() -> None:
    """Leave the process group; safe to call twice."""
    if torch.distributed.is_initialized():
        from minitron_mcore.runtime.parallel import release_layout

        release_layout()
        torch.distributed.destroy_process_group()


def measured_world(runtime: Runtime) -> World:
    """The world as it is, with the memory of the rank, and of the node, that has least, and the oldest of the GPUs;
    every rank calls."""
    on_cuda = runtime.device.type == "cuda"
    major, minor = torch.cuda.get_device_capability() if on_cuda else (0, 0)
    mine = torch.tensor(
        [*device_memory(runtime.local_size), *host_memory(), 100 * major + minor], device=runtime.device
    )
    torch.distributed.all_reduce(mine, op=torch.distributed.ReduceOp.MIN)
    *memory, oldest = mine.tolist()
    world = World(
        runtime.rank,
        runtime.world_size,
        runtime.local_rank,
        runtime.local_size,
        device=runtime.device.type,
        memory=Memory(*memory),
        engine=engine_version(),
    )
    if not on_cuda:
        return world
    built_with = [int(part) for part in str(torch.version.cuda).split(".")[:2] if part.isdecimal()]
    cuda = (built_with[0], built_with[1]) if len(built_with) == 2 else None
    return replace(world, capability=divmod(oldest, 100), cuda=cuda)


def device_memory(local_ranks: int) -> tuple[int, int]:
    """(free, total) bytes of this rank's device; on CPU its share of the host memory of a node of `local_ranks`.

    On CUDA what PyTorch's allocator keeps from earlier work and has given to no tensor is free too.
    """
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated(), total
    free, total = host_memory()
    return free // local_ranks, total // local_ranks


@cache
def forget_groups_in_children() -> None:
    """A forked child of a single process, as of `multiprocessing` in a notebook, can start afresh; under a launcher a
    child has no world of its own.

    gloo's threads stay in the parent: in the child, a collective of the inherited groups would hang and destroying them
    would abort. So the child forgets them, and makes new ones when it needs them.
    """
    os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() > 1:
        return
    from minitron_mcore.runtime.parallel import release_layout

    with suppress(AttributeError):  # private names of torch: there are no public ones
        for group in c10d._pg_map:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))  # never destroyed
        for known in (c10d._pg_map, c10d._pg_names, c10d._pg_group_ranks, c10d._pg_to_tag, c10d._tags_to_pg):
            known.clear()
        c10d._world.default_pg = None
        release_layout()
