"""Checkpoint tensors directly from the layout table, without building a model, for pruning and conversion.

The tensors are those of `GPTModel.sharded_state_dict` (a test checks that): per-layer parameters are one global tensor
[L, …], and a gated fc1 is stored as gate then up, each sharded by tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import said_by
from minitron_mcore.checkpoint.reader import TensorReader
from minitron_mcore.layout import Parameter, local_shape
from minitron_mcore.runtime.agree import all_or_none

# One stored parameter: its key, and its layer where it has one.
Name = tuple[str, int | None]


def sharded_parts(
    parameter: Parameter,
    architecture: Architecture,
    local: torch.Tensor,
    *,
    layer: int | None,
    tensor_rank: int,
    tensor_size: int,
    data_rank: int,
) -> list[ShardedTensor]:
    """This rank's part of one parameter (of one global layer), as stored in a checkpoint: one tensor, or two for a
    gated fc1 [gate_r ; up_r]. `local` has the shape of `layout.local_shape`."""
    prepend = () if layer is None else ((0, layer, architecture.num_layers),)
    shift = len(prepend)
    axis = parameter.shard_axis
    if axis is None:
        replica = (0, tensor_rank, data_rank)
        return [
            ShardedTensor.from_rank_offsets(parameter.key, local, *prepend, replica_id=replica, prepend_axis_num=shift)
        ]
    parts = local.chunk(2, dim=axis) if parameter.gated else (local,)
    fragments = tensor_size * len(parts)
    return [
        ShardedTensor.from_rank_offsets(
            parameter.key,
            part,
            *prepend,
            (axis + shift, half * tensor_size + tensor_rank, fragments),
            replica_id=(0, 0, data_rank),
            prepend_axis_num=shift,
        )
        for half, part in enumerate(parts)
    ]


def stored_parts(
    parameter: Parameter,
    architecture: Architecture,
    dtype: torch.dtype,
    *,
    layer: int | None,
    tensor_rank: int,
    tensor_size: int,
) -> list[ShardedTensor]:
    """`sharded_parts` of what is yet to be read: only shapes and places, on the meta device."""
    local = torch.empty(local_shape(parameter, architecture, tensor_size), dtype=dtype, device="meta")
    return sharded_parts(
        parameter,
        architecture,
        local,
        layer=layer,
        tensor_rank=tensor_rank,
        tensor_size=tensor_size,
        data_rank=0,
    )


def read_parameters(
    folder: Path,
    iteration: int,
    architecture: Architecture,
    wanted: Iterable[tuple[Parameter, int | None]],
    *,
    tensor_rank: int,
    tensor_size: int,
) -> dict[Name, torch.Tensor]:
    """Local parts [layout.local_shape] of the `wanted` (parameter, layer)s, in the stored dtype, on the host.

    Every rank of the world calls, each with its own list (possibly empty), of layers on any stage. The checkpoint may
    have been saved at any layout. Raises InputError, on every rank, if it is damaged or not of `architecture`.
    """

    def read_here() -> dict[Name, torch.Tensor]:
        reader = TensorReader(folder, iteration)
        reader.check(architecture, said_by(folder))
        return {
            (parameter.key, layer): reader.read_part(parameter, architecture, layer, tensor_rank, tensor_size)
            for parameter, layer in wanted
        }

    return all_or_none(read_here)
