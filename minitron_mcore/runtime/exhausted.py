"""Whether an error means that memory ran out, of a device or of the host."""

from __future__ import annotations

# Messages of the allocators (host, device, pinned memory) and, on a device that is nearly full, of cuBLAS and NCCL; the
# last is how agree.py tells another rank's.
_SAID = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cuda failure 2 'out of memory'",
    "Cuda failure 'out of memory'",
    "MemoryError",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that a device, or the host, has no memory left."""
    import torch  # takes seconds, which a forecast alone need not wait for

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _SAID)
