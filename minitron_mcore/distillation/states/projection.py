"""The learned linear map that lifts the student's states to the teacher's width (arXiv 2407.14679, section 3).

One weight, shared by all states that are compared: [h_t, h_s]. Every pipeline stage holds a copy of it, in its first
chunk, and every tensor-parallel rank too; their gradients are added up over the stages (`finalize_gradients`), so that
all copies stay one and the same weight. It is trained and stored with the student but is no part of it: readers of
the checkpoint skip it (layout.BESIDE_THE_MODEL), and so it is never exported.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.distributed import finalize_model_grads

from minitron_mcore.layout import BESIDE_THE_MODEL
from minitron_mcore.model.gpt import LanguageModel, unwrap
from minitron_mcore.model.initialize import draw_normal
from minitron_mcore.runtime.groups import data_group, pipeline_group, tensor_group
from minitron_mcore.runtime.overlap import before_finalizing

NAME = "state_projection"
assert f"{NAME}.".startswith(BESIDE_THE_MODEL)


class Projection(torch.nn.Module):
    """h_s -> h_t of the last axis, without a bias."""

    def __init__(self, chunk: LanguageModel, teacher_hidden_size: int, seed: int) -> None:
        """Normal with variance 1 / h_s, from (seed, name): states keep their scale, and every layout the values. To be
        trained and stored with `chunk`, this rank's first. Every rank calls, before `wrap_model` and after the model's
        own weights are in place."""
        super().__init__()
        config = chunk.config
        shape = (teacher_hidden_size, config.hidden_size)
        weight = draw_normal(f"{NAME}.weight", shape, 1 / math.sqrt(config.hidden_size), seed)
        self.weight = torch.nn.Parameter(weight.to(device=torch.cuda.current_device(), dtype=config.params_dtype))
        # Under sequence parallelism a rank's gradient is that of its own tokens: Megatron adds such ones up.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        # Megatron's gradient norm counts a parameter that is marked so on no rank, and this one on the first stage.
        self.weight.shared = pipeline_group().rank() > 0  # type: ignore[attr-defined]
        # In a bucket of its own, as the embedding that stages share, every stage has the same part of it on a rank, and
        # adds up what its data-parallel ranks have reduced.
        self.weight.shared_embedding = True  # type: ignore[attr-defined]
        chunk.add_module(NAME, self)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """[..., h_s] -> [..., h_t]."""
        return torch.nn.functional.linear(state, self.weight)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> ShardedStateDict:
        """One stored tensor, of which every rank's copy is a replica."""
        replica = tuple(group.rank() for group in (pipeline_group(), tensor_group(), data_group(with_context=True)))
        key = f"{prefix}weight"
        return {key: ShardedTensor.from_rank_offsets(key, self.weight, replica_id=replica)}


def finalize_gradients(models: list[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
    """Megatron's own; then the gradients of a projection, if any, are added up over the stages. Every rank calls."""
    before_finalizing(models)
    finalize_model_grads(models, *args, **kwargs)
    projection = getattr(unwrap(models[0]), NAME, None)
    if projection is not None and pipeline_group().size() > 1:
        torch.distributed.all_reduce(projection.weight.main_grad, group=pipeline_group())
