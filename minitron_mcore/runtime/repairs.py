"""Repairs of the few places where megatron-core is silently wrong, each with its reason and a test.

They apply to 0.16.1 and 0.19.2 alike, except three: the error of a full disk, from 0.17 on; gradients where token
weights sum to less than 1, from 0.18 on; and the optimizer's state of several buckets, which Megatron-LM's own main
branch has repaired since (its pull request 5077). test_repairs.py and test_full_disk.py of tests/distributed fail
without them.
"""

from __future__ import annotations

import functools
import gc
import inspect
import os
import queue
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

from minitron_mcore.runtime.background import end_with
from minitron_mcore.runtime.optimizer_pieces import held_tensors, own_pieces, set_held

_ON_ITS_STREAM = object()  # in a handle's place: what waits is the stream
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def pipeline_communication(virtual_pipeline: int | None) -> dict[str, bool]:
    """TransformerConfig fields for point-to-point communication.

    Interleaved with two stages, the previous and the next rank are the same process; batched sends then pair up
    wrongly and activations and gradients swap, without an error. Ordered sends do not.
    """
    interleaved = virtual_pipeline is not None
    return {"overlap_p2p_comm": interleaved, "batch_p2p_comm": not interleaved}


def optimizer_state(optimizer: MegatronOptimizer, model_state: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """`optimizer.sharded_state_dict` in the fully reshardable form, correct under torch's Adam too. All ranks call.

    Torch's Adam (no Apex, no Transformer Engine) needs two repairs: before its first step (which a save may precede,
    where all steps so far were skipped) there is no `step` to save, on which state_dict asserts; and every call with
    `is_loading` leaves one `step` tensor shared by all parameters, which then counts once a parameter.

    A third, of whatever Adam: where gradients lie in several buckets, each is padded to a multiple of 128 and of the
    ranks, and Megatron, which gathers the state without the padding, cuts it up as if it were there. To load, the
    padding counts as part of the buckets. To save, Megatron gathers nothing: every rank gives what it holds
    (optimizer_pieces.py). Do not step before that is written.
    """
    with ExitStack() as stack:
        for part in _distributed_optimizers(optimizer):
            _fill_empty_adam_state(part.optimizer)
            stack.enter_context(_padding_kept(part) if is_loading else _taken_in_pieces(part))
        gc.freeze()  # Megatron then collects garbage, which takes as long in torch's heap as to write 1 GB
        stack.callback(gc.unfreeze)
        state = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=SHARDING)
    separate_steps(optimizer)
    return state


@contextmanager
def _padding_kept(part: Any) -> Iterator[None]:
    """Within the `with`, the padding of a buffer's buckets counts as part of them."""
    padded = [each for buffer in part.buffers for each in (buffer, *buffer.buckets)]
    kept, sizes = [each.numel_unpadded for each in padded], part.per_bucket_numel_unpadded
    try:
        part.per_bucket_numel_unpadded = part.per_bucket_numel
        for each in padded:
            each.numel_unpadded = each.grad_data.numel()
        yield
    finally:
        part.per_bucket_numel_unpadded = sizes
        for each, numel in zip(padded, kept, strict=True):
            each.numel_unpadded = numel


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict`, with each parameter left its own `step` afterwards. All ranks call."""
    inner = _distributed_optimizers(optimizer)
    for part in inner:
        part._set_main_param_and_optimizer_states = _with_step(part, part._set_main_param_and_optimizer_states)
    try:
        optimizer.load_state_dict(state)
    finally:
        for part in inner:
            del part._set_main_param_and_optimizer_states
    separate_steps(optimizer)


def held_state(optimizer: MegatronOptimizer, prefix: str) -> dict[int, dict[str, Any]]:
    """What this rank holds of the optimizer, for a checkpoint that only the same layout loads. No other rank is asked.
    prefix: of the tensors' names, of this rank alone."""
    state = {}
    for number, part in enumerate(_distributed_optimizers(optimizer)):
        _fill_empty_adam_state(part.optimizer)
        if not part.optimizer.state:  # another Adam's, to load into
            part.load_state_dict(part.state_dict())
        state[number] = {"groups": part.state_dict(), "held": held_tensors(part, f"{prefix}.{number}")}
    return state


def load_held_state(optimizer: MegatronOptimizer, state: dict[int, dict[str, Any]]) -> None:
    """Resume from what `held_state` gave, in place."""
    for number, part in enumerate(_distributed_optimizers(optimizer)):
        saved = state[number]
        part.load_state_dict(saved["groups"])
        part._set_main_param_and_optimizer_states = _with_step(part, part._set_main_param_and_optimizer_states)
        try:
            set_held(part, saved["held"])
        finally:
            del part._set_main_param_and_optimizer_states
    separate_steps(optimizer)


def held_shapes(optimizer: MegatronOptimizer) -> list[Any]:
    """How this rank's part of the optimizer lies: the shapes of what it holds, and the types of the state."""
    found: list[Any] = []
    for part in _distributed_optimizers(optimizer):
        maps = [each for ranges in part.gbuf_ranges for buckets in ranges.values() for each in buckets]
        ranges = [len(place["gbuf_world"]) for each in maps for place in each["param_map"].values()]
        config = part.config
        types = [config.main_params_dtype, config.exp_avg_dtype, config.exp_avg_sq_dtype]
        found.append([ranges, [str(each) for each in types], type(part.optimizer).__name__])
    return found


def separate_steps(optimizer: MegatronOptimizer) -> None:
    """Give every parameter a `step` tensor of its own."""
    for part in _distributed_optimizers(optimizer):
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


def save_without_helper() -> None:
    """Before a synchronous `dist_checkpointing.save`: its results pass through a queue of this process, a new one each
    time, since a save that failed leaves its results there.

    megatron-core's own queue is in a helper process, which takes seconds to start, holds 200 MB for the rank's life and
    outlives a rank that is killed. Only an asynchronous save needs another process.
    """
    if isinstance(filesystem_async._results_queue, queue.SimpleQueue | None):
        filesystem_async._results_queue = queue.SimpleQueue()


def plan_save(strategy: TorchDistSaveShardedStrategy, state: Any, folder: Path) -> AsyncRequest:
    """The strategy's asynchronous save, planned and not begun. All ranks call.

    From 0.18 on it is nvidia-resiliency-ext's unless megatron-core's own is asked for by name.
    """
    known = inspect.signature(strategy.async_save).parameters
    own = {"async_strategy": "mcore"} if "async_strategy" in known else {}
    return strategy.async_save(state, folder, **own)


def own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, for a tensor on the host, as a storage that ends with the tensor.

    A saver copies a part of a larger storage before it writes, since the whole storage would be written.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.dim() or not tensor.numel():
        return tensor
    flat = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return torch.from_numpy(flat).view(tensor.dtype).view(tensor.shape)


@contextmanager
def write_errors() -> Iterator[list[Exception]]:
    """Within the `with`, the list collects the errors met while a save of this process wrote its data.

    From 0.17 on the save itself reports only an error's type, as text, so a full disk cannot be recognised.

    A process that writes a part ends with this one: left behind, as by `kill -9`, it waits for ever for its result to
    be taken, and keeps this rank's connections open, so that the other ranks do not see that it is gone.
    """
    writer = filesystem_async.FileSystemWriterAsync
    original, met, parent = writer.write_preloaded_data, [], os.getpid()

    @functools.wraps(original)
    def remembering(*arguments: Any, **named: Any) -> Any:
        if os.getpid() != parent:
            end_with(parent)
        output = original(*arguments, **named)
        if isinstance(output, tuple) and isinstance(output[1], Exception):
            met.append(output[1])
        return output

    writer.write_preloaded_data = staticmethod(remembering)
    try:
        yield met
    finally:
        writer.write_preloaded_data = staticmethod(original)


def remember_reductions(groups: Sequence[Any]) -> None:
    """Let DDP's bucket groups know that their gradients are being reduced where there are several instances of the
    optimizer and reductions are overlapped.

    With one instance a handle says so. With several there is none, since a stream of their own carries them: in the
    first step those that the pipeline has started are reduced again at its end, and sums of sums come out.
    """
    for group in groups:
        group.start_grad_sync = functools.partial(_start_once, group)
        group.finish_grad_sync = functools.partial(_finish, group)


def _start_once(group: Any, **how: Any) -> None:
    if group.is_first_batch and group.grad_reduce_handle is not None:
        return
    type(group).start_grad_sync(group, **how)
    group.grad_reduce_handle = _ON_ITS_STREAM


def _finish(group: Any, **how: Any) -> None:
    type(group).finish_grad_sync(group, **how)
    group.grad_reduce_handle = None


def divide_gradients(chunks: list[torch.nn.Module], counted: torch.Tensor) -> None:
    """Divide the gradients by the global number of counted tokens: the sum over data-parallel ranks of `counted`, which
    the last stage knows and the others are given. Every rank calls, after `finalize_model_grads` without a number.

    Given the number, that function divides by at least 1 from 0.18 on, so fractional token weights would make gradients
    too small. Nothing is divided where no token counts.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    torch.distributed.broadcast(counted, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    torch.distributed.all_reduce(counted, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    # On the device: the host waits for nothing here.
    factor: Any = torch.where(counted > 0, 1.0 / counted, 1.0)
    for chunk in chunks:
        cast(DistributedDataParallel, chunk).scale_gradients(factor)


@contextmanager
def _taken_in_pieces(part: Any) -> Iterator[None]:
    part.sharded_param_state_fully_reshardable = functools.partial(own_pieces, part)
    try:
        yield
    finally:
        del part.sharded_param_state_fully_reshardable


def _distributed_optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [part for part in parts if isinstance(part, DistributedOptimizer)]


def _fill_empty_adam_state(adam: Any) -> None:
    if not isinstance(adam, torch.optim.Adam) or adam.state:
        return
    for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
        means = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        adam.state[parameter] = {"step": torch.tensor(0.0), **means}


def _with_step(part: Any, original: Any) -> Any:
    """Loading copies every entry of Adam's state, including `step`, which the loaded tensors lack."""

    def set_states(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        if isinstance(part.optimizer, torch.optim.Adam):
            group_index, group_order = part.model_param_group_index_map[model_param]
            main_param = part.optimizer.param_groups[group_index]["params"][group_order]
            tensors = {"step": part.optimizer.state[main_param]["step"], **tensors}
        original(model_param, tensors)

    return set_states
