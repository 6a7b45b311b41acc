"""Checkpoint tensors straight from the layout table, without building a model: what pruning and conversion read and
write.

The tensors are those of `GPTModel.sharded_state_dict` (a test holds that): per-layer parameters are one global tensor
[L, …], and a gated fc1 is stored as gate then up, each sharded by tensor-parallel rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import iteration_folder
from minitron_mcore.errors import InputError
from minitron_mcore.layout import Parameter, local_shape, parameter_table

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
    """This rank's part of one parameter (of one global layer), as it lies in a checkpoint: one tensor, or two for a
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

    Every rank of the world calls, each with its own wishes (possibly none); layers may lie on any stage. The
    checkpoint may have been saved at any layout. Raises InputError where it is no checkpoint of `architecture`.
    """
    stored = stored_dtypes(folder, iteration)
    state: dict[str, Any] = {}
    names: list[tuple[Parameter, int | None]] = list(wanted)
    # The whole table, not this rank's wishes: every rank raises, or none.
    for parameter in parameter_table(architecture):
        if parameter.key not in stored:
            raise InputError(
                f"{iteration_folder(folder, iteration)} holds no {parameter.key}: "
                "architecture.yaml beside it is of another model"
            )
    for parameter, layer in names:
        empty = torch.empty(local_shape(parameter, architecture, tensor_size), dtype=stored[parameter.key])
        parts = sharded_parts(
            parameter, architecture, empty, layer=layer, tensor_rank=tensor_rank, tensor_size=tensor_size, data_rank=0
        )
        state[_flat(parameter.key, layer)] = [_stacked(part) for part in parts]
    loaded = dist_checkpointing.load(state, str(iteration_folder(folder, iteration)), validate_access_integrity=False)
    state.clear()  # its tensors are what the parts of a gated fc1 are views of
    result: dict[Name, torch.Tensor] = {}
    for parameter, layer in names:
        shape = local_shape(parameter, architecture, tensor_size)
        parts = loaded.pop(_flat(parameter.key, layer))
        stacked = parts[0].dim() - len(shape)
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=stacked + (parameter.shard_axis or 0))
        result[parameter.key, layer] = whole.view(shape)
    return result


def _stacked(part: ShardedTensor) -> ShardedTensor:
    """The same part with the layer as an axis of its data, [1, …].

    megatron-core 0.16.1 cannot read some of the layers of a stacked parameter in a single process: it lays what is
    left out on the next rank, which is this one.
    """
    ones = (1,) * part.prepend_axis_num
    shape = (*ones, *part.local_shape)
    return dataclasses.replace(part, data=part.data.view(shape), local_shape=shape, prepend_axis_num=0)


def _flat(key: str, layer: int | None) -> str:
    return key if layer is None else f"{key}@{layer}"


def stored_dtypes(folder: Path, iteration: int) -> dict[str, torch.dtype]:
    """dtype of every tensor stored in a finished iteration; no collective."""
    metadata = dist_checkpointing.load_tensors_metadata(str(iteration_folder(folder, iteration)))
    return {tensor.key: tensor.dtype for tensor in metadata.values()}
