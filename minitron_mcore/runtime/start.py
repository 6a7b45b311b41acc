"""One start-up for a single process, `torchrun` and `srun`: ranks, device, backend, process groups, seeds."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass

import torch
from torch.distributed import HashStore

from minitron_mcore.errors import InputError
from minitron_mcore.runtime import agree, cpu_adapter
from minitron_mcore.runtime.fork import forget_groups_in_children
from minitron_mcore.runtime.timeout import collective_timeout
from minitron_mcore.runtime.world import own_interface, read_world


@dataclass
class Runtime:
    """Where this process stands. One for each process, passed to every stage."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    local_size: int = 1  # ranks of this node
    stop_signal: int = 0  # of a stop request that came in a training's last iteration

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

    broadcast = staticmethod(agree.broadcast)
    on_main = staticmethod(agree.on_main)


def start() -> Runtime:
    """Start this process: device, adapter, and the world's process group (NCCL on CUDA, gloo on CPU).

    Every rank calls it once. Model-parallel groups come later, from `parallel.use_layout`, since stages may differ.
    """
    quiet_libraries()
    world = read_world(os.environ)
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
    if not torch.distributed.is_initialized():
        # A single process meets nobody, so it needs no port, which another process might hold.
        meeting = {"store": HashStore()} if world.address is None else {"init_method": world.address}
        with own_interface(world.size):
            torch.distributed.init_process_group(
                backend, rank=world.rank, world_size=world.size, timeout=collective_timeout(), **meeting
            )
    if world.size == 1:
        forget_groups_in_children()
    return Runtime(
        rank=world.rank, world_size=world.size, local_rank=local_rank, device=device, local_size=world.local_size
    )


def stop() -> None:
    """Leave the process group; safe to call twice."""
    from minitron_mcore.runtime.parallel import release_layout

    if torch.distributed.is_initialized():
        release_layout()
        torch.distributed.destroy_process_group()


def quiet_libraries() -> None:
    """Silence warnings of Megatron and torch at import about optional parts (Apex, Transformer Engine)."""
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", message=r".*(pynvml|No CUDA|destroy_process_group|is not a CUDA).*")
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"Please use DTensor instead", category=FutureWarning)
    for name in ("megatron", "torch.distributed.elastic", "torch.distributed.checkpoint"):
        logging.getLogger(name).setLevel(logging.ERROR)
