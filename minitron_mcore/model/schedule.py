"""One pass over a global batch with Megatron's schedules: training, evaluation, scoring and teacher alike.

Legend: s sequence, b micro-batch, h hidden. A batch is a list of microbatches, each a dict of [b, s] tensors:
tokens, labels, loss_mask, position_ids. Every rank of a data-parallel replica holds the same list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from minitron_mcore.model.gpt import LanguageModel, unwrap

Microbatch = dict[str, Any]
# (loss to train, number of counted tokens, sums to report), all summed over the microbatch's tokens.
LossSums = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
LossFunction = Callable[[LanguageModel, torch.Tensor, Microbatch], LossSums]


def run_schedule(
    chunks: list[torch.nn.Module], batch: list[Microbatch], loss: LossFunction, *, forward_only: bool = False
) -> dict[str, float]:
    """Forward (and backward) over all microbatches; `loss` runs on the last stage, from the final hidden states.

    Gradients are left divided by the global number of counted tokens. Returns each reported sum divided by that
    number, over microbatches and data-parallel ranks: the same on every rank. Every rank calls.
    """

    def forward_step(iterator: Iterator[Microbatch], model: torch.nn.Module) -> Any:
        microbatch = next(iterator)
        hidden = model(microbatch["tokens"], microbatch["position_ids"], None)
        return hidden, partial(_schedule_loss, loss, unwrap(model), microbatch)

    sums = _call_schedule(chunks, batch, forward_step, forward_only=forward_only)
    return _mean_over_tokens(sums)


def final_hidden_states(chunks: list[torch.nn.Module], batch: list[Microbatch]) -> list[torch.Tensor]:
    """Forward only, no gradients: the final hidden states [s, b, h] of every microbatch, on the last stage.

    Other stages get an empty list. Under sequence parallelism each rank gets its part of s. Every rank calls.
    """

    def forward_step(iterator: Iterator[Microbatch], model: torch.nn.Module) -> Any:
        microbatch = next(iterator)
        return model(microbatch["tokens"], microbatch["position_ids"], None), _keep

    with torch.no_grad():
        return _call_schedule(chunks, batch, forward_step, forward_only=True, collect_non_loss_data=True)


def _keep(hidden: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
    return hidden


def forward_only(
    chunks: list[LanguageModel], batch: list[Microbatch], after: Callable[[LanguageModel, Microbatch], None]
) -> None:
    """Forward only, no gradients, nothing kept: what is wanted of it, hooks have to take. Every rank calls.

    `after(chunk, microbatch)` is called when a chunk has run a microbatch, before another one starts. A collective in
    it may be over tensor-parallel ranks alone: pipeline stages are at different microbatches.
    """

    _forward(chunks, batch, lambda chunk, hidden, microbatch: after(chunk, microbatch))


def visit_final_states(
    chunks: list[LanguageModel],
    batch: list[Microbatch],
    visit: Callable[[LanguageModel, torch.Tensor, Microbatch], None],
) -> None:
    """Forward only, no gradients, nothing kept: on the last stage `visit(chunk, hidden, microbatch)` gets the final
    hidden states [s, b, h] (this rank's part of s under sequence parallelism) of one microbatch after another.

    A collective in it may be over tensor-parallel ranks alone. Every rank calls.
    """

    def after(chunk: LanguageModel, hidden: torch.Tensor, microbatch: Microbatch) -> None:
        if chunk.post_process:
            visit(chunk, hidden, microbatch)

    _forward(chunks, batch, after)


def _forward(
    chunks: list[LanguageModel],
    batch: list[Microbatch],
    after: Callable[[LanguageModel, torch.Tensor, Microbatch], None],
) -> None:
    """Forward only, no gradients, nothing kept; `after(chunk, its output, microbatch)`."""

    def forward_step(iterator: Iterator[Microbatch], model: torch.nn.Module) -> Any:
        microbatch = next(iterator)
        hidden = model(microbatch["tokens"], microbatch["position_ids"], None)
        after(unwrap(model), hidden, microbatch)
        return hidden, _drop

    with torch.no_grad():
        _call_schedule(list(chunks), batch, forward_step, forward_only=True, collect_non_loss_data=True)


def _drop(hidden: torch.Tensor, non_loss_data: bool = True) -> None:
    return None


def _schedule_loss(loss: LossFunction, model: LanguageModel, microbatch: Microbatch, hidden: torch.Tensor) -> LossSums:
    total, num_tokens, sums = loss(model, hidden, microbatch)
    return total, num_tokens.detach().to(torch.int), {"num_tokens": num_tokens.detach(), **sums}


def _call_schedule(
    chunks: list[torch.nn.Module], batch: list[Microbatch], forward_step: Callable[..., Any], **options: Any
) -> list[Any]:
    config = unwrap(chunks[0]).config
    schedule = get_forward_backward_func(
        config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    )
    micro_batch_size, sequence_length = batch[0]["tokens"].shape
    interleaved = len(chunks) > 1
    return schedule(
        forward_step_func=forward_step,
        data_iterator=[iter(batch) for _ in chunks] if interleaved else iter(batch),
        model=chunks if interleaved else chunks[0],
        num_microbatches=len(batch),
        seq_length=sequence_length,
        micro_batch_size=micro_batch_size,
        **options,
    )


def _mean_over_tokens(rows: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Sum over microbatches and data-parallel ranks, give it to every stage, divide by the number of tokens."""
    box: list[Any] = [None]
    if rows:
        names = list(rows[0])
        total = torch.stack([torch.stack([row[name].double() for name in names]) for row in rows]).sum(0)
        torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        box = [dict(zip(names, total.tolist(), strict=True))]
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast_object_list(box, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    sums: dict[str, float] = box[0]
    count = max(sums["num_tokens"], 1.0)
    return {name: value if name == "num_tokens" else value / count for name, value in sums.items()}
