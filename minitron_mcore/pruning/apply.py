"""A plan applied to a sharded checkpoint: no rank ever holds the model.

Work is laid out as the student is: a rank reads its tensor-parallel part of the teacher's layers that become its
stage's layers, wherever they lay, and prunes one parameter at a time. A global plan keeps unevenly many rows of each
teacher shard, so on the sharded axis the tensor-parallel ranks send each other the rows that now lie elsewhere, until
each has its contiguous part of the student's axis:

    teacher's rows   rank 0: 0 1 2 3 | rank 1: 4 5 6 7        the plan keeps 0 2 3 6
    kept parts       rank 0: 0 2 3   | rank 1: 6              rank 0 sends row 3
    student's part   rank 0: 0 2     | rank 1: 3 6

Where every rank keeps just what it needs (query heads, whose KV groups stay; the vocabulary) nothing is sent. Values
are copied, never computed: every layout gives the same bits, in the stored dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from minitron_mcore.checkpoint.sharding import read_parameters, sharded_parts
from minitron_mcore.checkpoint.store import save_state
from minitron_mcore.layout import Parameter, check_tensor_parallel, parameter_table, split_layers
from minitron_mcore.plan import PruningPlan
from minitron_mcore.pruning.axes import kept_rows, shard_rows, take
from minitron_mcore.runtime.start import Runtime

Parts = dict[str, list[ShardedTensor]]


def prune_checkpoint(source: tuple[Path, int], plan: PruningPlan, target: Path, runtime: Runtime) -> None:
    """Write iteration 0 of `target`: the student that `plan` cuts out of `source` (folder, iteration).

    Every rank of the world calls, after `use_layout`; virtual stages are of no account here. Data-parallel replicas
    beyond the first only take part in the collectives of reading and saving. Raises InputError for a layout that
    cannot hold the student. Nothing counts as a checkpoint before all of it is written.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    tensor_size = group.size()
    check_tensor_parallel(plan.student, tensor_size)
    stages = split_layers(plan.student.num_layers, parallel_state.get_pipeline_model_parallel_world_size())
    stage = parallel_state.get_pipeline_model_parallel_rank()
    works = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    wanted = list(stage_parameters(plan, stages, stage)) if works else []
    teacher = read_parameters(
        *source,
        plan.teacher,
        [(parameter, None if layer is None else plan.layers[layer]) for parameter, layer in wanted],
        tensor_rank=group.rank(),
        tensor_size=tensor_size,
    )
    student: Parts = {}
    for parameter, layer in wanted:
        teacher_layer = None if layer is None else plan.layers[layer]
        local = teacher.pop((parameter.key, teacher_layer))
        local = prune_shard(local, parameter, plan, teacher_layer, group=group, device=runtime.device)
        student[f"{parameter.key}@{layer}"] = sharded_parts(
            parameter, plan.student, local, layer=layer, tensor_rank=group.rank(), tensor_size=tensor_size, data_rank=0
        )
    save_state(target, 0, {"model": student}, runtime)


def stage_parameters(
    plan: PruningPlan, stages: list[list[list[int]]], stage: int
) -> Iterator[tuple[Parameter, int | None]]:
    """(parameter, student's layer) of everything pipeline `stage` writes, in checkpoint order.

    A tied output head is the embedding, which the first stage writes.
    """
    for parameter in parameter_table(plan.student):
        if parameter.per_layer:
            yield from ((parameter, layer) for layer in stages[stage][0])
        elif stage == (0 if parameter.key.startswith("embedding.") else len(stages) - 1):
            yield parameter, None


def prune_shard(
    local: torch.Tensor,
    parameter: Parameter,
    plan: PruningPlan,
    layer: int | None,
    *,
    group: torch.distributed.ProcessGroup,
    device: torch.device,
) -> torch.Tensor:
    """This rank's part of the student's parameter from its part of the teacher's (of the teacher's `layer`).

    `local` has `layout.local_shape` of the teacher, the result that of the student; same dtype, same device. Every
    rank of `group`, the tensor-parallel one, calls; `device` is where its collectives run.
    """
    kept = kept_rows(parameter, plan, layer)
    for axis, rows in enumerate(kept):
        if axis != parameter.shard_axis:
            local = take(local, axis, rows)
    if parameter.shard_axis is None:
        return local
    held, wanted = shard_moves(parameter, plan, kept[parameter.shard_axis], group.size())
    rank = group.rank()
    local = take(local, parameter.shard_axis, held[rank][:, 0])
    if all(numpy.array_equal(held[r][:, 1], wanted[r]) for r in range(group.size())):
        return local
    return _exchange(local, parameter.shard_axis, [part[:, 1] for part in held], wanted, group, device)


def shard_moves(
    parameter: Parameter, plan: PruningPlan, kept: numpy.ndarray, size: int
) -> tuple[list[numpy.ndarray], list[numpy.ndarray]]:
    """For each tensor-parallel rank: what it keeps of its teacher shard, and what its student shard is made of.

    `kept` [n]: kept rows of the sharded global axis. Returns held[rank] [m, 2], of (row in the teacher's shard, row of
    the student's global axis), in shard order; and wanted[rank] [n / size], rows of the student's global axis.
    """
    student_row = numpy.full(parameter.shape(plan.teacher)[parameter.shard_axis or 0], -1)
    student_row[kept] = numpy.arange(len(kept))
    held, wanted = [], []
    for rank in range(size):
        rows = student_row[shard_rows(parameter, plan.teacher, rank, size)]
        (places,) = numpy.nonzero(rows >= 0)
        held.append(numpy.stack([places, rows[places]], axis=1))
        wanted.append(shard_rows(parameter, plan.student, rank, size))
    return held, wanted


def _exchange(
    local: torch.Tensor,
    axis: int,
    held: list[numpy.ndarray],
    wanted: list[numpy.ndarray],
    group: torch.distributed.ProcessGroup,
    device: torch.device,
) -> torch.Tensor:
    """Rows wanted[this rank] of the student's global axis; rank r holds rows held[r] of it along `axis` of its `local`.

    One row of `axis` after another goes to the rank that wants it, as bytes: any dtype, any backend.
    """
    me = group.rank()
    holder, place = (numpy.empty(sum(len(part) for part in held), dtype=numpy.int64) for _ in range(2))
    for rank, part in enumerate(held):
        holder[part], place[part] = rank, numpy.arange(len(part))
    sent = [place[part[holder[part] == me]] for part in wanted]
    arriving = [numpy.nonzero(holder[wanted[me]] == rank)[0] for rank in range(len(held))]

    rows = local.movedim(axis, 0)
    outgoing = rows.index_select(0, torch.from_numpy(numpy.concatenate(sent)))
    outgoing = outgoing.reshape(-1, prod(rows.shape[1:])).view(torch.uint8).to(device)
    incoming = outgoing.new_empty((len(wanted[me]), outgoing.shape[1]))
    torch.distributed.all_to_all_single(
        incoming, outgoing, [len(part) for part in arriving], [len(part) for part in sent], group=group
    )
    order = torch.from_numpy(numpy.argsort(numpy.concatenate(arriving)))
    taken = incoming.to(local.device).index_select(0, order)
    return taken.view(local.dtype).view(-1, *rows.shape[1:]).movedim(0, axis).contiguous()
