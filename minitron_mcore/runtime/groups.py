"""Megatron's process groups of the layout that stands (parallel.use_layout), for this rank.

A group's `rank()` and `size()` are this rank's place along that axis, and how many there are.
"""

from __future__ import annotations

from megatron.core import parallel_state
from torch.distributed import ProcessGroup


def tensor_group() -> ProcessGroup:
    return parallel_state.get_tensor_model_parallel_group()


def pipeline_group() -> ProcessGroup:
    return parallel_state.get_pipeline_model_parallel_group()


def context_group() -> ProcessGroup:
    return parallel_state.get_context_parallel_group()


def data_group(*, with_context: bool = False) -> ProcessGroup:
    """The data-parallel ranks; with `with_context` those of all parts of a sequence."""
    return parallel_state.get_data_parallel_group(with_context_parallel=with_context)


def on_last_stage() -> bool:
    """Whether this rank's pipeline stage is the last one."""
    return parallel_state.is_pipeline_last_stage(ignore_virtual=True)
