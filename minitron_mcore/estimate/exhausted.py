"""Memory that ran out after all: how that is recognised, and what is said of it. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from minitron_mcore.errors import MemoryExhaustedError
from minitron_mcore.estimate.forecast import Forecast, advice

# Messages of the allocators (host, device, pinned memory) and, on a device that is nearly full, of cuBLAS and NCCL.
_EXHAUSTED = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cuda failure 2 'out of memory'",
    "Cuda failure 'out of memory'",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that a device, or the host, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _EXHAUSTED)


@contextmanager
def explaining_memory(expected: Forecast, when: str) -> Iterator[None]:
    """Within the `with`, memory that runs out is raised as MemoryExhaustedError, with what was needed and what helps.

    when: what was going on, in words.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryExhaustedError) or not is_out_of_memory(error):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        lines = [f"out of memory {when}: {said[:300]}", "the forecast of a rank:", expected.table()]
        if helpful := advice(expected):
            lines += ["what helps most:", *(f"  {line}" for line in helpful)]
        raise MemoryExhaustedError("\n".join(lines)) from error
