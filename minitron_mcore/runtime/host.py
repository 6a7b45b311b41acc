"""The machine under the ranks: how much memory a rank's device and its node have."""

from __future__ import annotations

import torch

from minitron_mcore.runtime.machine import host_memory
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.runtime.world import Memory, World


def measured_world(runtime: Runtime) -> World:
    """The world as it is, with the memory of the rank, and of the node, that has least; every rank calls."""
    mine = torch.tensor([*device_memory(runtime.local_size), *host_memory()], device=runtime.device)
    torch.distributed.all_reduce(mine, op=torch.distributed.ReduceOp.MIN)
    return World(
        rank=runtime.rank,
        size=runtime.world_size,
        local_rank=runtime.local_rank,
        local_size=runtime.local_size,
        device=runtime.device.type,
        memory=Memory(*mine.tolist()),
    )


def device_memory(local_ranks: int) -> tuple[int, int]:
    """(free, total) bytes of this rank's device; on CPU its share of the host memory of a node of `local_ranks`.

    On CUDA what PyTorch's allocator keeps from earlier work and has given to no tensor is free too.
    """
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated(), total
    free, total = host_memory()
    return free // local_ranks, total // local_ranks
