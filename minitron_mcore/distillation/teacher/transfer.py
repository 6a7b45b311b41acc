"""Sends tensors of microbatches from rank to rank, as routes.py plans it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from minitron_mcore.distillation.teacher.routes import Move, Moves


def carry(
    moves: Moves, held: Mapping[int, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype, axis: int = 0
) -> dict[int, torch.Tensor]:
    """Carry out `moves`; every rank that has a part in them calls, all with the same `moves`.

    held: microbatch -> this rank's part of its tensor, for what this rank is the source of.
    shape, dtype: of a whole tensor, cut along `axis`; the parts travel in `dtype`.

    Returns what this rank is to get, by microbatch: its part, or all of it. What it holds already is not copied.
    """
    rank = dist.get_rank()
    unit = shape[axis] // moves.units
    arriving: dict[int, list[Move]] = {}
    for move in moves.of_rank(rank):
        if move.destination == rank:
            arriving.setdefault(move.microbatch, []).append(move)
    results, ops, landed = {}, [], []
    for number, parts in arriving.items():
        whole = _whole_here(parts, held, unit, axis, dtype)
        if whole is None:
            size = list(shape)
            size[axis] = sum(part.stop - part.start for part in parts) * unit
            whole = torch.empty(size, dtype=dtype, device=torch.cuda.current_device())
        results[number] = whole
    for move in moves.of_rank(rank):
        start, length = move.start * unit, (move.stop - move.start) * unit
        if move.source == rank:
            part = held[move.microbatch].narrow(axis, start - move.held * unit, length).to(dtype)
            if move.destination != rank:
                ops.append(dist.P2POp(dist.isend, part.contiguous(), move.destination))
                continue
        target = results[move.microbatch].narrow(axis, start - move.wanted * unit, length)
        if move.source == rank:
            if target.data_ptr() != part.data_ptr():
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


def _whole_here(
    parts: list[Move], held: Mapping[int, torch.Tensor], unit: int, axis: int, dtype: torch.dtype
) -> torch.Tensor | None:
    """The tensor that this rank holds itself, where it is all that the rank is to get, and no more."""
    only = parts[0]
    if len(parts) > 1 or not only.is_local:
        return None
    tensor = held[only.microbatch]
    fits = only.held == only.start and tensor.shape[axis] == (only.stop - only.start) * unit
    return tensor if fits and tensor.dtype == dtype else None
