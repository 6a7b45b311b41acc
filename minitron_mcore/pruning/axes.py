"""What a plan keeps of every parameter, axis by axis, and who holds it: the one definition, in numbers alone.

The axis names are those of layout.py's table. Legend: d head dimension (kv_channels), q query heads in a KV group.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy
import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.layout import Parameter, shard_slices
from minitron_mcore.plan import PruningPlan

# One axis: (plan, the teacher's layer) -> kept rows [n] of the teacher's global axis, int64, in the student's order.
Rows = Callable[[PruningPlan, int], numpy.ndarray]


def _vocab(plan: PruningPlan, layer: int) -> numpy.ndarray:
    return numpy.arange(plan.teacher.padded_vocab_size)


def _hidden(plan: PruningPlan, layer: int) -> numpy.ndarray:
    return numpy.array(plan.hidden)


def _ffn(plan: PruningPlan, layer: int) -> numpy.ndarray:
    return numpy.array(plan.ffn[layer])


def _gated_ffn(plan: PruningPlan, layer: int) -> numpy.ndarray:
    """[2f]: the gate's rows, then the up projection's."""
    neurons = _ffn(plan, layer)
    return numpy.concatenate([neurons, plan.teacher.ffn_hidden_size + neurons])


def _heads(plan: PruningPlan, layer: int) -> numpy.ndarray:
    """[heads * d]: the d columns of every kept query head."""
    return _blocks(numpy.array(plan.heads[layer]), plan.teacher.kv_channels)


def _qkv(plan: PruningPlan, layer: int) -> numpy.ndarray:
    """[groups * (q + 2) * d]: of each group its kept query heads, then its key and its value."""
    q = plan.teacher.heads_per_group
    kept = numpy.array(plan.heads[layer])
    group, place = numpy.divmod(kept, q)
    queries = (group * (q + 2) + place).reshape(plan.teacher.num_query_groups, -1)
    first = numpy.arange(plan.teacher.num_query_groups)[:, None] * (q + 2)
    blocks = numpy.concatenate([queries, first + q, first + q + 1], axis=1)
    return _blocks(blocks.reshape(-1), plan.teacher.kv_channels)


def _head(plan: PruningPlan, layer: int) -> numpy.ndarray:
    """[d]: the channels of a head are never pruned."""
    return numpy.arange(plan.teacher.kv_channels)


def _blocks(indices: numpy.ndarray, size: int) -> numpy.ndarray:
    """Rows of the given blocks of `size` rows each."""
    return (indices[:, None] * size + numpy.arange(size)).reshape(-1)


AXES: dict[str, Rows] = {
    "vocab": _vocab,
    "hidden": _hidden,
    "ffn": _ffn,
    "gated_ffn": _gated_ffn,
    "heads": _heads,
    "head": _head,
    "qkv": _qkv,
}


def kept_rows(parameter: Parameter, plan: PruningPlan, layer: int | None) -> list[numpy.ndarray]:
    """For each axis of the global parameter (of the teacher's `layer`), the rows that stay, in the student's order."""
    return [AXES[axis](plan, -1 if layer is None else layer) for axis in parameter.axes]


def prune_dense(tensor: torch.Tensor, parameter: Parameter, plan: PruningPlan, layer: int | None) -> torch.Tensor:
    """The student's whole parameter from the teacher's; `layer` is the teacher's (None where it has none)."""
    for axis, rows in enumerate(kept_rows(parameter, plan, layer)):
        tensor = take(tensor, axis, rows)
    return tensor


def take(tensor: torch.Tensor, axis: int, rows: numpy.ndarray) -> torch.Tensor:
    """`rows` of `axis`, copied; the tensor itself where they are all of it in order."""
    if len(rows) == tensor.shape[axis] and numpy.array_equal(rows, numpy.arange(len(rows))):
        return tensor
    return tensor.index_select(axis, torch.from_numpy(rows).to(tensor.device))


def shard_rows(parameter: Parameter, architecture: Architecture, rank: int, size: int) -> numpy.ndarray:
    """Global rows of the sharded axis that tensor-parallel `rank` of `size` holds, in its local order."""
    slices = shard_slices(parameter, architecture, rank, size)
    return numpy.concatenate([numpy.arange(part.start, part.stop) for part in slices])
