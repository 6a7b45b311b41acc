"""How a layer that lies elsewhere is cut into memory: one flat buffer, on the host in pinned blocks. Pure.

PyTorch's allocator of pinned memory rounds every block up to a power of two (`CachingHostAllocator.h`): 436 MB take
537 MB. So a layer is kept as a few blocks, the largest powers of two that fit, as in

    436 MB = 268.4 + 134.2 + 33.4, the last rounded up to 33.6
"""

from __future__ import annotations

from collections.abc import Iterable

ALIGNMENT = 256  # bytes: what CUDA's own allocator gives, so that kernels find what they are used to
SPARE = 64  # of a layer, one part of so many at most is lost to rounding


def aligned(nbytes: int, parts: int = 1) -> int:
    """`nbytes`, up to what can be cut into `parts` that are all multiples of ALIGNMENT."""
    unit = ALIGNMENT * parts
    return -(-nbytes // unit) * unit


def flat_bytes(sizes: Iterable[int]) -> int:
    """Of one buffer with tensors of so many bytes, each at a multiple of ALIGNMENT."""
    return sum(map(aligned, sizes))


def pinned_bytes(nbytes: int) -> int:
    """What PyTorch takes for a pinned tensor of `nbytes`: the next power of two."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0


def host_blocks(nbytes: int) -> list[int]:
    """Bytes of the blocks that `nbytes` are kept in, one after another: powers of two but for the last, all of which
    take `nbytes` x (1 + 1 / SPARE) at most when pinned."""
    blocks, left = [], nbytes
    while pinned_bytes(left) - left > nbytes // SPARE:
        blocks.append(1 << (left.bit_length() - 1))
        left -= blocks[-1]
    return [*blocks, left] if left else blocks
