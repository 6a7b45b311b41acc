"""A plan applied to a model in memory: the student stands beside its teacher, at the layout the teacher runs at.

Tensor-parallel ranks send each other the rows that come to lie elsewhere (apply.py). A layer that comes to lie on
another pipeline stage is cut where it is, and what is left of it is sent there, one parameter at a time: a stage holds
its part of the teacher, its part of the student, and one parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from minitron_mcore.layout import Parameter, local_shape, parameter_table, stage_of
from minitron_mcore.model.gpt import LanguageModel, build_model, layout_of, unwrap
from minitron_mcore.model.initialize import named_parameters
from minitron_mcore.pruning.apply import prune_shard
from minitron_mcore.pruning.plan_file import PruningPlan
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.runtime.groups import pipeline_group, tensor_group


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
            shape = local_shape(parameter, plan.student, group.size())
            part = torch.empty(shape, dtype=config.params_dtype, device=device)
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
