"""Tensors moved block by block, several at once: a block is read, checked, summed and written while it is in the cache.

Work on a block runs outside Python's lock (reads and writes of files, xxhash, numpy), so threads overlap it. Pure.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy
import torch
import xxhash

from minitron_mcore.checkpoint.manifest import tensor_bytes
from minitron_mcore.files import BLOCK, MOST_THREADS

# Larger writes have Linux look for as much memory in one piece. A virtual machine may have given such pieces back to
# its host, and then a write takes five times as long (docs/log.md, 2026-11-30).
WRITE = 1 << 17
THREADS = max(2, min(MOST_THREADS, os.cpu_count() or 1))  # two also on one core: one works while the other waits
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Rows:
    """A tensor made row by row: `fill(target, start)` puts the rows from `start` on into `target` [n, …], of the
    `dtype`, on the host. Any thread may call it: no collectives."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: Callable[[torch.Tensor, int], None]
    held: torch.Tensor | None = None  # all of them, where they are in memory anyway

    def read(self) -> torch.Tensor:
        """The whole tensor."""
        whole = torch.empty(self.shape, dtype=self.dtype)
        self.fill(whole, 0)
        return whole


def rows_of(tensor: torch.Tensor) -> Rows:
    """Of a tensor that is there."""

    def fill(target: torch.Tensor, start: int) -> None:
        copy_quietly(target, tensor[start : start + len(target)])

    return Rows(tuple(tensor.shape), tensor.dtype, fill, tensor)


def copy_quietly(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy between tensors of one dtype on the host, without threads of torch's own: each thread would start some."""
    bits = _BITS[target.dtype.itemsize]
    numpy.copyto(target.view(bits).numpy(), source.view(bits).numpy())


def rearranged(arrange: Callable[[list[torch.Tensor]], torch.Tensor], parts: Sequence[Rows]) -> Rows:
    """The rows of `parts` as `arrange`, which moves whole rows of tensors, would order theirs."""
    firsts = [0]  # from which each part's rows are numbered; a gap keeps the parts apart
    for part in parts:
        firsts.append(firsts[-1] + part.shape[0] + 1)
    order = arrange([torch.arange(first, first + part.shape[0]) for first, part in zip(firsts, parts, strict=False)])
    breaks = (torch.nonzero(order.diff() != 1).flatten() + 1).tolist()
    starts = [0, *breaks] if len(order) else []
    ends = [*breaks, len(order)]
    begins = [int(order[start]) for start in starts]

    def fill(target: torch.Tensor, start: int) -> None:
        at, stop = start, start + len(target)
        while at < stop:
            run = bisect_right(starts, at) - 1
            until = min(ends[run], stop)
            number = begins[run] + at - starts[run]
            part = bisect_right(firsts, number) - 1
            parts[part].fill(target[at - start : until - start], number - firsts[part])
            at = until

    return Rows((len(order), *parts[0].shape[1:]), parts[0].dtype, fill)


def read_at(path: Path, offset: int, target: torch.Tensor) -> None:
    """Fill the contiguous `target` with the bytes of a file from `offset` on. Raises EOFError if it is shorter."""
    content = tensor_bytes(target)
    with path.open("rb", buffering=0) as stream:
        while len(content):
            count = os.preadv(stream.fileno(), [content], offset)
            if count == 0:
                raise EOFError(f"{path.name} ends at byte {offset:,}")
            content, offset = content[count:], offset + count


def write_at(descriptor: int, content: memoryview, offset: int) -> None:
    """Write all of `content` at `offset` of a file that is open."""
    while len(content):
        count = os.pwrite(descriptor, content[:WRITE], offset)
        content, offset = content[count:], offset + count


class Mover:
    """Writes tensors into files that are open. `told(size)` is called with the bytes of each block that is written, by
    one thread at a time."""

    def __init__(self, told: Callable[[int], None] = lambda size: None) -> None:
        self.told = told
        self._lock, self._stopped = threading.Lock(), False

    def move(self, rows: Rows, descriptor: int, offset: int) -> str:
        """Write `rows` at `offset`; returns their checksum, as of manifest.stored_piece."""
        count = rows.shape[0]
        step = max(1, BLOCK // max(prod(rows.shape[1:]) * rows.dtype.itemsize, 1))
        buffer = torch.empty((min(step, count) * (rows.held is None), *rows.shape[1:]), dtype=rows.dtype)
        digest = xxhash.xxh3_128()
        for start in range(0, count, step):
            if rows.held is None:
                block = buffer[: min(step, count - start)]
                rows.fill(block, start)
            else:
                block = rows.held[start : start + step]
            content = tensor_bytes(block)
            digest.update(content)
            write_at(descriptor, content, offset)
            offset += len(content)
            with self._lock:
                if self._stopped:
                    raise _StoppedError
                self.told(len(content))
        return digest.hexdigest()

    def all(self, jobs: Sequence[tuple[Rows, int, int]]) -> list[str]:
        """`move` of each (rows, descriptor, offset), on THREADS threads, the largest first; the checksums, in the order
        of `jobs`.

        An error of one is raised when no thread works any more, and what had not begun is left; of several errors the
        first job's.
        """
        order = sorted(range(len(jobs)), key=lambda job: -prod(jobs[job][0].shape))
        with ThreadPoolExecutor(THREADS) as pool:
            futures = {job: pool.submit(self.move, *jobs[job]) for job in order}
            try:
                wait(futures.values(), return_when=FIRST_EXCEPTION)
            finally:  # also when the main thread is interrupted
                self._stopped = True
                pool.shutdown(cancel_futures=True)
        done = [futures[job] for job in range(len(jobs)) if not futures[job].cancelled()]
        errors = [error for future in done if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, _StoppedError)):
            raise error
        self._stopped = False
        return [future.result() for future in done]


class _StoppedError(Exception):
    """Another thread failed."""
