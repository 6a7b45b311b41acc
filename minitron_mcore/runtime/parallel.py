"""Model-parallel process groups from the recipe's `parallel` section, and the seeds over them."""

from __future__ import annotations

import dataclasses
import random
from datetime import timedelta

import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from minitron_mcore.runtime.config import ParallelConfig, check_layout
from minitron_mcore.runtime.world import collective_timeout, own_interface

_current: ParallelConfig | None = None
_teacher_groups: dict[str, ProcessGroupCollection] = {}  # by layout, for as long as the student's groups stand
# Axes of the layout -> the fields of a ProcessGroupCollection whose groups span them; "" a group of one rank.
_FIELDS = {
    "tp": ("tp", "expt_tp", "tp_ep"),
    "pp": ("pp",),
    "cp": ("cp",),
    "dp": ("dp",),
    "tp-pp": ("mp", "tp_ep_pp"),
    "tp-cp": ("tp_cp",),
    "dp-cp": ("dp_cp", "intra_dp_cp", "expt_dp", "intra_expt_dp"),
    "tp-dp-cp": ("tp_dp_cp",),
    "tp-dp-cp-pp": ("intra_dist_opt",),
    "": ("ep", "inter_dist_opt"),
}


def layout_stands() -> bool:
    """Whether this process has model-parallel groups."""
    return parallel_state.model_parallel_is_initialized()


def is_laid_out(parallel: ParallelConfig) -> bool:
    """Whether the groups that stand are those of `parallel`, instances of the optimizer included."""
    return layout_stands() and repr(_current) == repr(parallel)


def use_layout(parallel: ParallelConfig, world_size: int) -> None:
    """Make Megatron's process groups for `parallel`; all ranks call. Nothing happens if they stand already."""
    global _current
    check_layout(parallel, world_size)
    if is_laid_out(parallel):
        return
    release_layout()
    with own_interface(world_size):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
            context_parallel_size=parallel.context,
            num_distributed_optimizer_instances=parallel.num_distributed_optimizer_instances,
            distributed_timeout_minutes=collective_timeout() // timedelta(minutes=1),
        )
    _current = dataclasses.replace(parallel)


def lay_out(parallel: ParallelConfig, seed: int, world_size: int) -> None:
    """Process groups, and the seeds, which differ over them; all ranks call."""
    use_layout(parallel, world_size)
    seed_everything(seed)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy, torch and Megatron's tensor-parallel generators (model-parallel groups must exist)."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def release_layout() -> None:
    """Destroy the model-parallel groups, so that another stage can use another layout in the same processes."""
    global _current
    _current = None
    _teacher_groups.clear()
    if layout_stands():
        parallel_state.destroy_model_parallel()


def teacher_groups(parallel: ParallelConfig, world_size: int) -> ProcessGroupCollection:
    """This rank's process groups of a second layout beside the current one; kept until `release_layout`.

    Every rank of the world calls. The groups of tied embeddings are None: nothing is trained in them.
    """
    key = repr(parallel)
    if key not in _teacher_groups:
        data = world_size // parallel.replica_ranks
        generator = parallel_state.RankGenerator(
            tp=parallel.tensor, ep=1, dp=data, pp=parallel.pipeline, cp=parallel.context, order="tp-cp-ep-dp-pp"
        )
        made: dict[tuple[int, ...], dist.ProcessGroup] = {}
        fields: dict[str, dist.ProcessGroup] = {}
        for axes, names in _FIELDS.items():
            for ranks in generator.get_ranks(axes) if axes else [[rank] for rank in range(world_size)]:
                if tuple(ranks) not in made:
                    with own_interface(world_size):
                        made[tuple(ranks)] = dist.new_group(ranks, timeout=collective_timeout())
                if dist.get_rank() in ranks:
                    fields |= dict.fromkeys(names, made[tuple(ranks)])
        _teacher_groups[key] = ProcessGroupCollection(**fields, embd=None, pos_embd=None, hcp=None)
    return _teacher_groups[key]
