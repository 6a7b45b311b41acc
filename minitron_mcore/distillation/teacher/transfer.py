"""Sends tensors of microbatches from rank to rank, as routes.py plans it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
import torch.distributed as dist

from minitron_mcore.distillation.teacher.routes import Moves


def carry(
    moves: Moves, held: Mapping[int, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype, axis: int = 0
) -> dict[int, torch.Tensor]:
    """Carry out `moves`; every rank that has a part in them calls, all with the same `moves`.

    held: microbatch -> this rank's part of its tensor, for what this rank is the source of.
    shape, dtype: of a whole tensor, cut along `axis`; the parts travel in `dtype`.

    Returns what this rank is to get, by microbatch: its part, or all of it. What it holds already is not copied.
    """
    rank, unit = dist.get_rank(), shape[axis] // moves.units
    mine = [move for move in moves.moves if rank in (move.source, move.destination)]
    arriving = defaultdict(list)
    for move in mine:
        if move.destination == rank:
            arriving[move.microbatch].append(move)
    results, ops, landed = {}, [], []
    for number, parts in arriving.items():
        size = list(shape)
        size[axis] = sum(part.stop - part.start for part in parts) * unit
        here = held[number] if len(parts) == 1 and parts[0].is_local else None
        if here is None or list(here.shape) != size or here.dtype != dtype:
            here = torch.empty(size, dtype=dtype, device=torch.cuda.current_device())
        results[number] = here
    for move in mine:
        start, length = move.start * unit, (move.stop - move.start) * unit
        if move.destination == rank:
            target = results[move.microbatch].narrow(axis, start - move.wanted * unit, length)
        if move.source == rank:
            part = held[move.microbatch].narrow(axis, start - move.held * unit, length).to(dtype)
            if move.destination != rank:
                ops.append(dist.P2POp(dist.isend, part.contiguous(), move.destination))
            elif target.data_ptr() != part.data_ptr():
                target.copy_(part)
            continue
        # Across another axis than the first, a part is no contiguous piece of memory.
        buffer = target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
        ops.append(dist.P2POp(dist.irecv, buffer, move.source))
        if buffer is not target:
            landed.append((target, buffer))
    if ops:
        for work in dist.batch_isend_irecv(ops):
            work.wait()
    for target, buffer in landed:
        target.copy_(buffer)
    return results
