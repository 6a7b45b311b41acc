"""Megatron's process groups of the layout that stands (parallel.use_layout), for this rank, and which part of every
sequence a rank holds under context parallelism.

A group's `rank()` and `size()` are this rank's place along that axis, and how many there are.

A sequence of s tokens is cut into 2 C chunks for C context-parallel ranks; rank c holds the chunks c and 2 C - 1 - c,
in that order, so that early tokens, which attend to little, and late ones, which attend to much, share a rank:

    C = 2    chunks  | 0 | 1 | 2 | 3 |    rank 0: 0 3    rank 1: 1 2

The order is Megatron's own; its rotary embedding and Transformer Engine's attention count on it.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from torch.distributed import ProcessGroup


def tensor_group() -> ProcessGroup:
    return parallel_state.get_tensor_model_parallel_group()


def pipeline_group() -> ProcessGroup:
    return parallel_state.get_pipeline_model_parallel_group()


def context_group() -> ProcessGroup:
    return parallel_state.get_context_parallel_group()


def data_group(*, with_context: bool = False) -> ProcessGroup:
    """The data-parallel ranks; with `with_context` those of all parts of a sequence."""
    return parallel_state.get_data_parallel_group(with_context_parallel=with_context)


def optimizer_instances() -> int:
    """Copies of the optimizer's state that the layout has, each of them cut over its part of the data-parallel ranks of
    all parts of a sequence."""
    part = parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=True)
    return data_group(with_context=True).size() // part.size()


def data_place() -> dict[str, int]:
    """Which data-parallel rank this is, and of how many, as what reads data takes it."""
    return {"data_parallel_rank": data_group().rank(), "data_parallel_size": data_group().size()}


def on_last_stage() -> bool:
    """Whether this rank's pipeline stage is the last one."""
    return parallel_state.is_pipeline_last_stage(ignore_virtual=True)


def held_chunks(rank: int, size: int) -> tuple[int, int]:
    """The two chunks, of 2 * size, that context-parallel `rank` holds, in its order."""
    return rank, 2 * size - 1 - rank


def context_part(whole: torch.Tensor, axis: int, rank: int, size: int) -> torch.Tensor:
    """Context-parallel `rank`'s part [.., s / size, ..] of `whole` [.., s, ..], whose `axis` is the sequence.

    `whole` itself where `size` is 1.
    """
    if size == 1:
        return whole
    chunks = whole.chunk(2 * size, dim=axis)
    return torch.cat([chunks[chunk] for chunk in held_chunks(rank, size)], dim=axis)


def in_order(gathered: torch.Tensor, size: int) -> torch.Tensor:
    """The ranks' parts one after another along axis 0, [s, ..] -> the same tokens in the sequence's order."""
    parts = gathered.chunk(2 * size)
    places = [chunk for rank in range(size) for chunk in held_chunks(rank, size)]
    return torch.cat([parts[places.index(chunk)] for chunk in range(2 * size)])
