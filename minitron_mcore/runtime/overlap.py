"""Data-parallel communication under the computation, by Megatron's DDP and DistributedOptimizer.

Gradients are reduced by buckets while the backward pass of the last microbatch goes on, and weights are gathered from
the step on, under whatever comes before the layer that needs them: the next batch, a teacher that runs ahead. Megatron
does both, in hooks of the parameters and modules. What stands here tells it what it cannot know: that gradients of
the embedding and the output head are there without autograd having passed them, that the head is read outside of its
module, that further microbatches follow in another call of the schedule.

`chunks` below are a model's in Megatron's DDP; what is not overlapped, or in no DDP, is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig

from minitron_mcore.runtime.repairs import remember_reductions


class Overlap(NamedTuple):
    """What is overlapped; bucket_size: parameters of a bucket, None: Megatron's, 40 million or 1 million a rank."""

    grad_reduce: bool = False
    param_gather: bool = False
    bucket_size: int | None = None

    def ddp_fields(self) -> dict[str, Any]:
        """Of DistributedDataParallelConfig."""
        return {
            "overlap_grad_reduce": self.grad_reduce,
            "overlap_param_gather": self.param_gather,
            # `start_gathering` starts all of them: the hooks are to wait, and start none.
            "align_param_gather": self.param_gather,
            "bucket_size": self.bucket_size,
        }


NOTHING = Overlap()


def prepare(chunks: Sequence[Any], config: TransformerConfig) -> None:
    """What is set on chunks and their `config` when they have been wrapped, as Megatron-LM's training sets it."""
    for group in _groups(chunks):
        if _is_alone(group):
            group.start_grad_sync, group.start_param_sync = partial(_scale_gradients, group), _nothing_to_gather
    if chunks[0].ddp_config.overlap_grad_reduce:
        if chunks[0].ddp_config.num_distributed_optimizer_instances > 1:
            remember_reductions(list(_groups(chunks)))
        held, started = [chunk.no_sync for chunk in chunks], [chunk.start_grad_sync for chunk in chunks]
        config.no_sync_func = held if len(chunks) > 1 else held[0]
        config.grad_sync_func = started if len(chunks) > 1 else started[0]
    if chunks[0].ddp_config.overlap_param_gather:
        for group in _groups(chunks):
            group.param_gather_dispatched = True  # the weights are whole until the first step


def _is_alone(group: Any) -> bool:
    """Whether the only data-parallel rank, not overlapped, would reduce and gather: gloo copies gradients and weights
    whole for that."""
    keys = group.ddp_config
    overlapped = keys.overlap_grad_reduce or keys.overlap_param_gather
    instances = keys.num_distributed_optimizer_instances
    return not overlapped and instances == 1 and group.intra_distributed_optimizer_instance_size == 1


def _scale_gradients(group: Any, force_all_reduce: bool | None = False) -> None:
    for bucket in group.buckets:
        if bucket.gradient_scaling_factor != 1.0:
            bucket.grad_data *= bucket.gradient_scaling_factor


def _nothing_to_gather(force_sync: bool = False) -> None: ...


def adopt_head(chunk: Any, head: torch.Tensor, before: torch.nn.Module) -> None:
    """Let the `head` of a wrapped chunk be overlapped like other weights, though the loss adds its gradient to
    `main_grad` and reads it outside of its module, once the module `before` has run."""
    adopt_added(chunk, head)
    if chunk.ddp_config.overlap_param_gather:
        group = chunk.param_to_bucket_group[head]
        before.register_forward_pre_hook(lambda *_: group.finish_param_sync(skip_next_bucket_dispatch=True))


def adopt_added(chunk: Any, weight: torch.Tensor) -> None:
    """Let the reduction of `weight` of a wrapped chunk be overlapped, though its gradient may be added to `main_grad`
    without autograd having passed it."""
    if not (chunk.ddp_config.overlap_grad_reduce and weight.requires_grad):
        return

    def nothing_to_add(gradients: tuple[torch.Tensor | None, ...]) -> None:
        # Megatron's hook wants to see some gradient, and not to add it: a view of one number takes no memory.
        weight.grad_added_to_main_grad = gradients[0] is None  # type: ignore[attr-defined]
        if gradients[0] is None:
            weight.grad = weight.new_zeros(()).expand_as(weight)

    node: Any = weight.view_as(weight).grad_fn
    node.next_functions[0][0].register_prehook(nothing_to_add)


@contextmanager
def gradients_held(config: TransformerConfig, chunks: Sequence[Any]) -> Iterator[None]:
    """Within the `with` no gradient is reduced, since further calls of the schedule add to it."""
    if config.no_sync_func is None:
        yield
        return
    kept = config.no_sync_func, config.grad_sync_func
    config.no_sync_func = config.grad_sync_func = None
    try:
        with ExitStack() as stack:
            for chunk in chunks:
                stack.enter_context(chunk.no_sync())
            yield
    finally:
        config.no_sync_func, config.grad_sync_func = kept


def before_finalizing(chunks: Sequence[Any]) -> None:
    """Leave nothing open that `finalize_model_grads` takes for granted: gathered weights that no module of this stage
    has waited for are waited for, and gradients whose reduction nothing has started, since one of them was in no
    microbatch's graph this time, are reduced. The same ones on all data-parallel ranks, which call."""
    for group in _groups(chunks):
        if group.param_gather_handle is not None:
            group.finish_param_sync(skip_next_bucket_dispatch=True)
        reduces = group.ddp_config.overlap_grad_reduce and not group.is_first_batch
        if reduces and group.grad_reduce_handle is None:
            group.start_grad_sync(force_all_reduce=chunks[0].force_all_reduce)


def start_gathering(chunks: Sequence[Any]) -> None:
    """Start to gather the weights after a step, those of the first layers first, though buckets lie in the order of
    backward: every module waits for its own. Every rank calls."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            for group in reversed([*_groups([chunk])]):
                group.start_param_sync()


def finish_gathering(chunks: Sequence[Any]) -> None:
    """Wait for all weights, for one who reads them outside of a forward pass. Every rank calls."""
    for group in _groups(chunks):
        if group.ddp_config.overlap_param_gather:
            group.finish_param_sync(skip_next_bucket_dispatch=True)


def _groups(chunks: Sequence[Any]) -> Iterator[Any]:
    return (group for chunk in chunks if isinstance(chunk, DistributedDataParallel) for group in chunk.bucket_groups)
