"""What each rank holds of the optimizer's state, as pieces of whole tensors that it can save without asking the others.

A data-parallel rank of Megatron's DistributedOptimizer has a flat range of each of some parameters. To save its fully
reshardable form, Megatron gathers these ranges on every rank by half a dozen copies of them, while training waits. But
a flat range of a tensor is a few rectangles of it, and a checkpoint can be made of any rectangles. Their names and the
shapes of the whole are Megatron's own, so what loads the one form loads the other, at any layout.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

STATES = ("param", "exp_avg", "exp_avg_sq")
Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes in a tensor


def boxes(shape: tuple[int, ...], start: int, end: int) -> list[Box]:
    """The elements `start` to `end` of a tensor of `shape`, in the order of memory, as boxes of it, in that order."""
    if start >= end:
        return []
    if not shape:
        return [((), ())]
    row, rest = prod(shape[1:]), shape[1:]

    def within(number: int, begin: int, stop: int) -> list[Box]:
        """Part of one row."""
        return [((number, *offsets), (1, *sizes)) for offsets, sizes in boxes(rest, begin, stop)]

    first, last = -(-start // row), end // row  # the whole rows
    if first > last:
        return within(last, start - last * row, end - last * row)
    head = within(first - 1, start % row, row) if start % row else []
    middle = [((first, *(0 for _ in rest)), (last - first, *rest))] if first < last else []
    tail = within(last, 0, end % row) if end % row else []
    return [*head, *middle, *tail]


def own_pieces(part: Any, model_state: Any, *_: Any) -> dict[int, list[ShardedTensor]]:
    """In place of `sharded_param_state_fully_reshardable` of the DistributedOptimizer `part`, to save: the pieces of
    this rank, by the number of their parameter, over the memory of the state itself. No rank waits for another.

    model_state: the sharded tensors of the model's parameters.
    """
    stated = {base.data: base for base in nested_values(extract_sharded_tensors_and_factories(model_state)[0])}
    maps = [found for ranges in part.gbuf_ranges for buckets in ranges.values() for found in buckets]
    own = {parameter: each["param"] for found in maps for parameter, each in found["param_map"].items()}
    order = [parameter for buffer in part.buffers for parameter in buffer.param_index_map]
    state: dict[int, list[ShardedTensor]] = {}
    for number, parameter in enumerate(order):
        if parameter not in own:
            continue
        held = part._get_main_param_and_optimizer_states(parameter)
        for key in STATES:
            flat = held[key].detach().float().view(-1)
            pieces = _pieces(stated[parameter], key, flat, own[parameter].start, part.distributed_optimizer_instance_id)
            state.setdefault(number, []).extend(pieces)
    return state


def held_tensors(part: Any, prefix: str) -> dict[int, dict[str, ShardedTensor]]:
    """What this rank holds of the state of the DistributedOptimizer `part`, each tensor whole under a name of its own,
    so that no other rank has a share of it: for a checkpoint that only the same layout loads.

    prefix: of the names; it must be of this rank and part alone.
    """
    return {
        number: {key: _whole(f"{prefix}.{number}.{key}", held[key].detach()) for key in STATES if key in held}
        for number, held in enumerate(map(part._get_main_param_and_optimizer_states, held_parameters(part)))
    }


def set_held(part: Any, held: dict[int, dict[str, torch.Tensor]]) -> None:
    """Copy what `held_tensors` gave into the state of `part`."""
    parameters = held_parameters(part)
    assert len(parameters) == len(held), (len(parameters), len(held))
    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            part._set_main_param_and_optimizer_states(parameter, held[number])


def held_parameters(part: Any) -> list[torch.nn.Parameter]:
    """The parameters of which this rank has a range."""
    maps = [found["param_map"] for ranges in part.gbuf_ranges for buckets in ranges.values() for found in buckets]
    return [parameter for found in maps for parameter in found]


def _whole(key: str, tensor: torch.Tensor) -> ShardedTensor:
    shape = tuple(tensor.shape)
    return ShardedTensor(key, tensor, tensor.dtype, shape, shape, tuple(0 for _ in shape), None, (0, 0, 0))


def _pieces(base: Any, key: str, flat: torch.Tensor, start: int, instance: int) -> list[ShardedTensor]:
    """Of the parameter that `base` describes, the elements from `start` on, which are `flat`."""
    pieces = []
    for whole in _tensors(base):
        begin = int(whole.data.storage_offset())  # of this tensor in the parameter
        low, high = max(start, begin), min(start + len(flat), begin + whole.data.numel())
        at, leading = low - start, whole.prepend_axis_num
        for offsets, sizes in boxes(whole.local_shape, low - begin, high - begin):
            shape = (*(1 for _ in range(leading)), *sizes)
            places = zip(whole.global_offset, (*(0 for _ in range(leading)), *offsets), strict=True)
            pieces.append(
                ShardedTensor(
                    f"optimizer.state.{key}.{whole.key}",
                    flat[at : at + prod(sizes)].view(shape),
                    flat.dtype,
                    shape,
                    whole.global_shape,
                    tuple(place + offset for place, offset in places),
                    None,  # no regular grid
                    (*whole.replica_id[:-1], instance),
                )
            )
            at += prod(sizes)
    return pieces


def _tensors(base: Any) -> list[ShardedTensor]:
    """The tensors that a parameter is stored as, such as both halves of a gated MLP's; their `data` tell where they lie
    in it and take no memory."""
    empty = torch.empty(base.data.shape, dtype=base.data.dtype, device="meta")
    if isinstance(base, ShardedTensorFactory):
        return list(nested_values(replace(base, data=empty).build()))
    return [replace(base, data=empty)]
