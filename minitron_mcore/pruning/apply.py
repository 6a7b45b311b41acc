"""A plan applied to a sharded model: no rank ever holds more of it than its shard and one parameter.

From a checkpoint, work is laid out as the student is. Since plans keep the teacher's order, the rows that become a
rank's contiguous part of the student's axis lie in one span of the teacher's, whatever it was sharded over:

    teacher's rows   0 1 2 3 4 5 6 7        the plan keeps 0 2 3 6
    student's part   rank 0: 0 2 | rank 1: 3 6
    read             rank 0: 0 to 2 | rank 1: 3 to 6

So each rank reads the span, keeps its rows and writes them, one parameter after another; nothing is sent, and neither
the teacher's shard nor the student's is ever in memory.

Weights in memory are where the teacher's layout put them, and the student stands beside its teacher: there the
tensor-parallel ranks send each other the rows that now lie elsewhere. A layer that comes to lie on another pipeline
stage is cut where it is, and what is left of it is sent there, one parameter at a time: a stage holds its part of the
teacher, its part of the student, and one parameter. Values are copied, but for head residuals, which are the same
arithmetic on the same rows everywhere: every layout gives the same bits, in the stored dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path

import numpy
import torch

from minitron_mcore.checkpoint.reader import TensorReader
from minitron_mcore.checkpoint.writer import Source, save_stream, shard_pieces
from minitron_mcore.layout import Parameter, check_tensor_parallel, parameter_table, stage_of, stage_parameters
from minitron_mcore.model.gpt import LanguageModel, build_model, layout_of, unwrap
from minitron_mcore.model.initialize import named_parameters
from minitron_mcore.pruning.axes import Part, part_of, shard_rows, take, take_kept
from minitron_mcore.pruning.plan_file import PruningPlan
from minitron_mcore.runtime.agree import all_or_none
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.runtime.groups import data_group, pipeline_group, tensor_group
from minitron_mcore.runtime.start import Runtime


def prune_checkpoint(
    source: tuple[Path, int], plan: PruningPlan, target: Path, runtime: Runtime, *, called: str | None = None
) -> None:
    """Write iteration 0 of `target`: the student that `plan` cuts out of `source` (folder, iteration).

    Every rank of the world calls, after `use_layout`; virtual stages are of no account here. Data-parallel replicas
    beyond the first have nothing to write. Raises InputError, on every rank, for a layout that cannot hold the student,
    for a teacher that is damaged or no model of the plan's, and where `target`, which messages call `called`, cannot be
    written; nothing counts as a checkpoint before all of it is written.
    """
    group = tensor_group()
    check_tensor_parallel(plan.student, group.size())
    here = stage_parameters(plan.student, pipeline_group().size(), pipeline_group().rank())
    works = data_group(with_context=True).rank() == 0

    def open_teacher() -> list[Source]:
        reader = TensorReader(*source, plan.teacher)
        return [
            found
            for parameter, layer in (here if works else ())
            for found in _sources(reader, plan, parameter, layer, group.rank(), group.size())
        ]

    sources = all_or_none(open_teacher)
    save_stream(target, 0, sources, runtime, architecture=plan.student, called=called, title="prune")


def _sources(
    reader: TensorReader, plan: PruningPlan, parameter: Parameter, layer: int | None, rank: int, size: int
) -> Iterator[Source]:
    """What tensor-parallel `rank` writes of the student's `layer`; nothing where another rank has it whole."""
    teacher_layer = None if layer is None else plan.layers[layer]
    dtype = reader.dtype(parameter.key, teacher_layer)
    halves = _halves(parameter, plan, teacher_layer, rank, size)
    for piece, half in zip(shard_pieces(parameter, plan.student, dtype, layer, rank, size), halves, strict=False):
        yield Source(piece, partial(_read, reader, plan, parameter, teacher_layer, half, dtype))


def _halves(parameter: Parameter, plan: PruningPlan, layer: int | None, rank: int, size: int) -> list[Part]:
    """The parts that a rank reads of a parameter of the teacher's `layer`: the two halves of a gated fc1 are stored one
    after the other, so each is read by itself."""
    part = part_of(parameter, plan, layer, rank, size)
    return [Part(part.axis, rows) for rows in numpy.split(part.rows, 2)] if parameter.gated else [part]


def _read(
    reader: TensorReader, plan: PruningPlan, parameter: Parameter, layer: int | None, part: Part, dtype: torch.dtype
) -> torch.Tensor:
    needed, shape = part.needed, parameter.shape(plan.teacher)
    first, last = int(needed.min()), int(needed.max()) + 1
    span = torch.empty((*shape[: part.axis], last - first, *shape[part.axis + 1 :]), dtype=dtype)
    reader.fill(span, parameter.key, layer, shape, part.axis, [slice(first, last)])
    return part.made_from(take_kept(span, parameter, plan, layer, part.axis, needed - first), plan)


@torch.no_grad()
def load_pruned(source: tuple[Path, int], plan: PruningPlan, chunks: Sequence[torch.nn.Module]) -> None:
    """Fill this rank's chunks, a model of the plan's student, with what the plan cuts out of `source` (folder,
    iteration), without a checkpoint of the student between: what `prune_checkpoint` writes and `load_weights` reads.

    Every rank of the world calls, at any layout and precision. Raises InputError, on every rank, for a teacher that is
    damaged or no model of the plan's.
    """

    def fill() -> None:
        reader = TensorReader(*source, plan.teacher)
        table = {parameter.key: parameter for parameter in parameter_table(plan.student)}
        for model in map(unwrap, chunks):
            group = model.tp_group
            for key, layer, local in named_parameters(model):
                parameter, teacher_layer = table[key], None if layer is None else plan.layers[layer]
                halves = _halves(parameter, plan, teacher_layer, group.rank(), group.size())
                dtype = reader.dtype(key, teacher_layer)
                for half, target in zip(halves, local.chunk(len(halves)), strict=True):
                    target.copy_(_read(reader, plan, parameter, teacher_layer, half, dtype))

    all_or_none(fill)


def prune_chunks(
    chunks: Sequence[torch.nn.Module], plan: PruningPlan, *, trainable: bool = False
) -> list[LanguageModel]:
    """This rank's chunks of the student that `plan` cuts out of the teacher in `chunks`; the teacher stays as it is.

    Same layout, precision and device as the teacher; the same bits as `prune_checkpoint` writes from weights of that
    precision. Every rank of the world calls, with its chunks of the plan's teacher. Raises InputError where the layout
    cannot hold the student. Source: arXiv 2407.14679, section 2.3.
    """
    teacher = [unwrap(chunk) for chunk in chunks]
    config = teacher[0].config
    parallel = layout_of(config)
    student = build_model(plan.student, parallel, "bf16" if config.bf16 else "fp32", trainable=trainable)
    held, wanted = _by_name(teacher), _by_name(student)
    group, stages = tensor_group(), pipeline_group()
    device = next(teacher[0].parameters()).device
    for parameter, layer, source, target in _moves(plan, parallel):
        from_layer = None if layer is None else plan.layers[layer]
        local = held.get((parameter.key, from_layer))
        arrives = layer is None or target == stages.rank()
        part = None
        if local is not None:
            part = prune_shard(local, parameter, plan, from_layer, group=group, device=device)
            if not arrives:
                # As bytes: gloo does not know every dtype.
                torch.distributed.send(part.contiguous().view(torch.uint8), group=stages, group_dst=target)
        elif arrives and layer is not None:
            part = torch.empty_like(wanted[parameter.key, layer])
            torch.distributed.recv(part.view(torch.uint8), group=stages, group_src=source)
        if part is not None and arrives:
            wanted.pop((parameter.key, layer)).copy_(part)
    assert not wanted, f"nothing was put into {sorted(map(str, wanted))}"
    return student


def _by_name(chunks: Sequence[LanguageModel]) -> dict[tuple[str, int | None], torch.Tensor]:
    """(checkpoint key, global layer) -> local parameter, without its history."""
    return {(key, layer): tensor.detach() for chunk in chunks for key, layer, tensor in named_parameters(chunk)}


def _moves(plan: PruningPlan, parallel: ParallelConfig) -> Iterator[tuple[Parameter, int | None, int, int]]:
    """(parameter, student's layer, stage it is on, stage it goes to), in one order for all ranks, so that sends and
    receives pair up. What belongs to no layer stays on its stage, whichever that is."""
    layout = parallel.pipeline, parallel.virtual_pipeline
    before = [stage_of(layer, plan.teacher.num_layers, *layout) for layer in plan.layers]
    after = [stage_of(layer, plan.student.num_layers, *layout) for layer in range(plan.student.num_layers)]
    layers = [*zip(range(plan.student.num_layers), before, after, strict=True)]
    for parameter in parameter_table(plan.student):
        for place in layers if parameter.per_layer else [(None, 0, 0)]:
            yield parameter, *place


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
    size = group.size() if parameter.shard_axis is not None else 1
    parts = [part_of(parameter, plan, layer, rank, size) for rank in range(size)]
    part = parts[group.rank() if size > 1 else 0]
    if size == 1:
        return part.made_from(take_kept(local, parameter, plan, layer, part.axis, part.needed), plan)
    local = take_kept(local, parameter, plan, layer, part.axis)
    held = [shard_rows(parameter, plan.teacher, rank, size) for rank in range(size)]
    return part.made_from(_exchange(local, part.axis, held, [part.needed for part in parts], group, device), plan)


def _exchange(
    local: torch.Tensor,
    axis: int,
    held: list[numpy.ndarray],
    wanted: list[numpy.ndarray],
    group: torch.distributed.ProcessGroup,
    device: torch.device,
) -> torch.Tensor:
    """Rows wanted[this rank] of the global axis, of which rank r holds held[r] along `axis` of its `local`.

    One row of `axis` after another goes to the rank that wants it, as bytes: any dtype, any backend.
    """
    me = group.rank()
    holder, place = (numpy.empty(sum(len(rows) for rows in held), dtype=numpy.int64) for _ in range(2))
    for rank, rows in enumerate(held):
        holder[rows], place[rows] = rank, numpy.arange(len(rows))
    if all((holder[rows] == rank).all() for rank, rows in enumerate(wanted)):
        return take(local, axis, place[wanted[me]])
    sent = [place[rows[holder[rows] == me]] for rows in wanted]
    arriving = [numpy.nonzero(holder[wanted[me]] == rank)[0] for rank in range(len(held))]

    lines = local.movedim(axis, 0)
    outgoing = lines.index_select(0, torch.from_numpy(numpy.concatenate(sent)).to(local.device))
    outgoing = outgoing.reshape(-1, prod(lines.shape[1:])).view(torch.uint8).to(device)
    incoming = outgoing.new_empty((len(wanted[me]), outgoing.shape[1]))
    torch.distributed.all_to_all_single(
        incoming, outgoing, [len(part) for part in arriving], [len(part) for part in sent], group=group
    )
    order = torch.from_numpy(numpy.argsort(numpy.concatenate(arriving))).to(local.device)
    taken = incoming.to(local.device).index_select(0, order)
    return taken.view(local.dtype).view(-1, *lines.shape[1:]).movedim(0, axis).contiguous()
