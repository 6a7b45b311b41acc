"""One rank of a cluster that is not there: Megatron's own groups, model, gradient buffers and optimizer, laid out for
it without memory.

torch's fake process group stands for any number of ranks and moves nothing; tensors are on the `meta` device, where
they have a shape and no values. So what a rank of a thousand would hold can be weighed in a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from minitron_mcore.architecture import Architecture
from minitron_mcore.runtime.config import ParallelConfig


@contextmanager
def fake_rank(parallel: ParallelConfig, world_size: int, rank: int) -> Iterator[None]:
    """Within the `with` this process is `rank` of `world_size` ranks laid out as `parallel`, its device `meta`."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from minitron_mcore.runtime import cpu_adapter
    from minitron_mcore.runtime.parallel import release_layout, use_layout

    cpu_adapter.install()
    if dist.is_initialized():
        dist.destroy_process_group()
    new_group, type_ = dist.new_group, torch.Tensor.type

    def fake_group(ranks: Any = None, timeout: Any = None, backend: Any = None, **others: Any) -> Any:
        return new_group(ranks, timeout=timeout, backend="fake", **others)  # Megatron asks for gloo by name

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        named = type_(self, *args, **kwargs)  # the optimizers compare it with torch.cuda.FloatTensor and its kin
        return named if args or kwargs else named.replace("meta.", "")

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with (
            patch.object(dist, "new_group", fake_group),
            patch.object(torch.Tensor, "type", type_name),
            patch.object(torch.cuda, "current_device", lambda: torch.device("meta")),
        ):
            use_layout(parallel, world_size)
            yield
    finally:
        release_layout()
        dist.destroy_process_group()


def size(tensors: Any) -> int:
    """Bytes of `tensors`."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def trained_bytes(architecture: Architecture, parallel: ParallelConfig, precision: str) -> dict[str, int]:
    """Bytes that this rank holds to train a model: its weights and the buffers that they lie in, the gradient buffers,
    and its shard of the optimizer's state, after a step. Called within `fake_rank`."""
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import build_optimizer, wrap_model

    models = build_model(architecture, parallel, precision)
    weights = size(tensor for model in models for tensor in model.parameters())
    chunks: Any = wrap_model(models)
    buffers = [buffer for chunk in chunks for buffer in chunk.buffers]
    optimizer: Any = build_optimizer(chunks, TrainConfig(tokens=1), precision)
    state: list[torch.Tensor] = []
    for part in optimizer.chained_optimizers:
        part._init_optimizer_states_with_dummy_values()  # as a step would
        values = (value for moments in part.optimizer.state.values() for value in moments.values())
        state += [value for value in values if value.dim()]
        if precision == "bf16":
            state += [tensor for group in part.optimizer.param_groups for tensor in group["params"]]
    return {
        "weights": weights,
        "weight buffers": size(buffer.param_data for buffer in buffers),
        "gradients": size(buffer.grad_data for buffer in buffers),
        "optimizer state": size(state),
    }


def frozen_bytes(
    architecture: Architecture, student: ParallelConfig, layout: ParallelConfig, precision: str, placement: str
) -> int:
    """Bytes that this rank keeps of a frozen teacher between two steps, in a `layout` of its own or the student's, as
    Teacher.load builds it. Called within `fake_rank`."""
    from minitron_mcore.distillation.teacher.placement import place
    from minitron_mcore.layout import local_shape, parameter_table
    from minitron_mcore.model.gpt import DTYPES, build_model
    from minitron_mcore.model.initialize import named_parameters
    from minitron_mcore.runtime.groups import on_last_stage
    from minitron_mcore.runtime.parallel import teacher_groups

    groups = teacher_groups(layout, dist.get_world_size()) if layout != student else None
    bare = placement != "resident"
    chunks = build_model(architecture, layout, precision, trainable=False, groups=groups, bare_layers=bare)
    head: list[torch.Tensor] = []
    if groups is not None:
        if chunks[-1].post_process:
            del chunks[-1].output_layer
        if on_last_stage():  # in the student's shards
            row = next(row for row in parameter_table(architecture) if row.is_embedding)
            shape = local_shape(row, architecture, student.tensor)
            head = [torch.empty(shape, dtype=DTYPES[precision], device="meta")]
    placed = place(chunks, placement, groups.dp_cp if groups is not None else None)
    parts: list[torch.Tensor] = []
    for chunk in chunks:
        for _ in placed.rows(chunk) if placed is not None else named_parameters(chunk):
            pass
    if placed is not None:
        parts = list(placed.source.parts.values())  # type: ignore[arg-type]
    return size([*(tensor for chunk in chunks for tensor in chunk.parameters()), *head, *parts])
