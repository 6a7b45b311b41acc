"""Model-parallel process groups from the recipe's `parallel` section, and what a layout can be."""

from __future__ import annotations

import dataclasses

from megatron.core import parallel_state

from minitron_mcore.errors import InputError
from minitron_mcore.runtime.config import ParallelConfig

_current: ParallelConfig | None = None


def check_parallel(parallel: ParallelConfig) -> None:
    """Raise InputError for a layout that no number of ranks can have."""
    for name in ("tensor", "pipeline", "context"):
        if getattr(parallel, name) < 1:
            raise InputError(f"parallel.{name}={getattr(parallel, name)} must be at least 1")
    if parallel.context > 1:
        # Nothing here cuts a sequence: every rank would attend to its own copy of the whole, and count it again.
        raise InputError(
            f"parallel.context={parallel.context} is not supported: a sequence stays whole, so set parallel.context=1 "
            "and raise parallel.tensor, with parallel.sequence=true"
        )
    if parallel.virtual_pipeline is not None and parallel.virtual_pipeline < 2:
        raise InputError(
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} must be at least 2 chunks a stage: "
            "leave it out for the plain 1F1B schedule"
        )
    if parallel.virtual_pipeline is not None and parallel.pipeline == 1:
        raise InputError(f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs parallel.pipeline of at least 2")
    if parallel.sequence and parallel.tensor == 1:
        raise InputError("parallel.sequence=true shards the sequence over tensor-parallel ranks: parallel.tensor is 1")


def check_layout(parallel: ParallelConfig, world_size: int) -> None:
    """Raise InputError, with the arithmetic, where `world_size` ranks cannot be laid out so."""
    check_parallel(parallel)
    model_ranks = parallel.tensor * parallel.pipeline
    if world_size % model_ranks:
        raise InputError(
            f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline} = {model_ranks} ranks for one "
            f"copy of the model, but {world_size} were started: start a multiple of {model_ranks}, or change parallel.*"
        )


def use_layout(parallel: ParallelConfig, world_size: int) -> None:
    """Make Megatron's process groups for `parallel`; all ranks call. Nothing happens if they stand already."""
    global _current
    check_layout(parallel, world_size)
    if parallel_state.model_parallel_is_initialized() and _current == parallel:
        return
    release_layout()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
    )
    _current = dataclasses.replace(parallel)


def release_layout() -> None:
    """Give the model-parallel groups back, so that another stage can use another layout in the same processes."""
    global _current
    _current = None
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
