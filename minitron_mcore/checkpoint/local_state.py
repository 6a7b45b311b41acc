"""What a rank keeps in a local checkpoint: the weights, shared out over the data-parallel ranks that have the same, its
own part of the optimizer's state as it lies, the schedules, and the progress. Only the same layout loads it.

It is megatron-core's MCoreTensorAwareStateDict, which nvidia-resiliency-ext copies to other ranks and writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.tensor_aware_state_dict import MCoreTensorAwareStateDict
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from minitron_mcore.checkpoint.store import load_models, model_state
from minitron_mcore.model.gpt import unwrap
from minitron_mcore.runtime.agree import gathered
from minitron_mcore.runtime.groups import context_group, data_group, optimizer_instances, pipeline_group, tensor_group
from minitron_mcore.runtime.repairs import held_shapes, held_state, load_held_state

# A model in training: its chunks in Megatron's DDP, its optimizer and its schedule.
Parts = tuple[list[torch.nn.Module], MegatronOptimizer, OptimizerParamScheduler]
# What such a state is made of, beside what torch admits.
CLASSES: list[Any] = [MCoreTensorAwareStateDict, ShardedTensor, ShardedObject]
ALGORITHM = "fully_parallel"  # Megatron's --non-persistent-local-ckpt-algo, and its default


class LocalState:
    """The state of `models`, by names of their own, to save and to load. Every rank makes one, and calls each method at
    the same time."""

    def __init__(self, models: Mapping[str, Parts]) -> None:
        self.models = models
        self._distribution: Any = None  # of the weights over data-parallel ranks, once it is known

    def layout(self) -> dict[str, Any]:
        """What must be the same where the state is loaded: how the ranks are laid out, and a checksum of how the state
        lies on them."""
        shapes: list[Any] = []
        for name, (chunks, optimizer, _) in self.models.items():
            parameters = [
                [key, str(parameter.dtype), list(parameter.shape)]
                for chunk in chunks
                for key, parameter in unwrap(chunk).named_parameters()
            ]
            shapes.append([name, parameters, held_shapes(optimizer)])
        mine = xxhash.xxh3_128_hexdigest(repr(shapes).encode())
        return {
            "world_size": dist.get_world_size(),
            "tensor": tensor_group().size(),
            "pipeline": pipeline_group().size(),
            "context": context_group().size(),
            "num_distributed_optimizer_instances": optimizer_instances(),
            "state": xxhash.xxh3_128_hexdigest("".join(gathered(mine)).encode()),
        }

    def take(self, progress: dict[str, Any]) -> MCoreTensorAwareStateDict:
        """What to save; its tensors are those that training goes on with. progress: plain numbers."""
        state, self._distribution = MCoreTensorAwareStateDict.from_state_dict(
            {**self._state(), "progress": progress},
            algo=ALGORITHM,
            parallelization_group=data_group(with_context=True),
            cached_metadata=self._distribution,
        )
        return state

    def put(self, saved: MCoreTensorAwareStateDict) -> dict[str, Any]:
        """Resume in place from what `take` gave on this rank, which has been through a file; its `progress`."""
        group = data_group(with_context=True)
        how = {"algo": ALGORITHM, "parallelization_group": group, "validate_access_integrity": False}
        loaded = saved.to_state_dict(self._state(), **how)
        for name, (chunks, optimizer, scheduler) in self.models.items():
            own = loaded[name]
            load_models(chunks, own)
            load_held_state(optimizer, own["optimizer"])
            scheduler.load_state_dict(own["opt_param_scheduler"])
        progress: dict[str, Any] = loaded["progress"]
        return progress

    def _state(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, (chunks, optimizer, scheduler) in self.models.items():
            state: dict[str, Any] = model_state(chunks)
            state["optimizer"] = held_state(optimizer, f"rank_{dist.get_rank()}.optimizer")
            for part in nested_values(state):
                if getattr(part, "data", None) is not None and isinstance(part.data, torch.Tensor):
                    part.data = part.data.detach()
            add_prefix_for_sharding(state, f"{name}.")
            found[name] = {**state, "opt_param_scheduler": scheduler.state_dict()}
        return found
