"""One pass over a global batch with Megatron's schedules: training, evaluation, scoring and teacher alike.

Legend: s sequence (under context parallelism a rank's part of it), b micro-batch, h hidden size. A batch is a list of
microbatches; every rank of a data-parallel replica holds the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection

from minitron_mcore.model.gpt import LanguageModel, unwrap
from minitron_mcore.model.microbatch import Microbatch, uncounted
from minitron_mcore.runtime.groups import data_group, pipeline_group
from minitron_mcore.runtime.repairs import divide_gradients

# (loss to train, number of counted tokens, sums to report), all summed over the microbatch's tokens.
LossSums = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
LossFunction = Callable[[LanguageModel, torch.Tensor, Microbatch], LossSums]
Begin = Callable[[LanguageModel, Microbatch], None]

GROUP = 16  # microbatches a pipeline stage in one call of the schedule: filling it then costs a sixteenth at most


def run_schedule(
    chunks: list[torch.nn.Module],
    batch: list[Microbatch],
    loss: LossFunction,
    *,
    forward_only: bool = False,
    prepare: Callable[[list[Microbatch]], None] | None = None,
    begin: Begin | None = None,
    stage_sums: Callable[[], dict[str, torch.Tensor]] | None = None,
    window: int = 0,
) -> dict[str, float]:
    """Forward (and backward) over all microbatches; `loss` runs on the last stage, from the final hidden states.

    window: microbatches a call of Megatron's schedule; 0: all of them. Before each window `prepare(its microbatches)`
        is called; gradients are synchronised and finalised in the last one only.
    begin: called before a chunk runs a microbatch; a collective in it may be over tensor-parallel ranks alone.
    stage_sums: further sums of this pipeline stage, called once after the last window: the same names on every rank,
        to be added over stages and data-parallel ranks.

    Gradients are left divided by the global number of counted tokens (the sum of the loss masks, which need not be
    whole). Returns each reported sum divided by that number, over microbatches and data-parallel ranks: the same on
    every rank. Every rank calls.
    """
    counted = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())

    def forward_step(iterator: Iterator[Microbatch], model: torch.nn.Module) -> Any:
        microbatch, chunk = next(iterator), unwrap(model)
        if begin is not None:
            begin(chunk, microbatch)

        def loss_of(hidden: torch.Tensor) -> LossSums:
            total, num_tokens, sums = loss(chunk, hidden, microbatch)
            counted.add_(num_tokens.detach())
            return total, num_tokens.detach().to(torch.int), {"num_tokens": num_tokens.detach(), **sums}

        return model(microbatch.tokens, microbatch.position_ids, None), loss_of

    rows = []
    windows = [batch[start : start + (window or len(batch))] for start in range(0, len(batch), window or len(batch))]
    for number, part in enumerate(windows, start=1):
        if prepare is not None:
            prepare(part)
        with _finalizing(chunks, counted, now=number == len(windows)):
            rows += _call_schedule(chunks, part, forward_step, forward_only=forward_only)
    return _mean_over_tokens(rows, stage_sums() if stage_sums is not None else {})


def in_calls(
    batches: Iterable[Microbatch],
    *,
    interleaved: bool,
    each: int = GROUP,
) -> Iterator[list[Microbatch]]:
    """`batches` cut for one call of a schedule after another, `each` microbatches a pipeline stage at a time.

    The interleaved schedule takes multiples of the number of stages: the last call is filled up with `uncounted`
    copies of its last microbatch. Batches are read as they are needed.
    """
    stages = pipeline_group().size()
    stream = iter(batches)
    while group := list(itertools.islice(stream, each * stages)):
        missing = -len(group) % stages if interleaved else 0
        yield group + [uncounted(group[-1]) for _ in range(missing)]


@contextmanager
def _finalizing(chunks: list[torch.nn.Module], counted: torch.Tensor, *, now: bool) -> Iterator[None]:
    """Within the `with`, the end of a schedule finalises gradients if `now`, by the exact count of tokens.

    Megatron finalises at the end of every schedule, and counts in whole numbers. `counted` holds the count on the last
    stage.
    """
    config = unwrap(chunks[0]).config
    finalize = config.finalize_model_grads_func

    def at_the_end(models: list[torch.nn.Module], num_tokens: Any, *args: Any, **kwargs: Any) -> None:
        if now:
            finalize(models, None, *args, **kwargs)
            divide_gradients(models, counted)

    config.finalize_model_grads_func = at_the_end if finalize is not None else None
    try:
        yield
    finally:
        config.finalize_model_grads_func = finalize


def final_hidden_states(
    chunks: list[torch.nn.Module],
    batch: list[Microbatch],
    begin: Begin | None = None,
    *,
    groups: ProcessGroupCollection | None = None,
) -> list[torch.Tensor]:
    """Forward only, no gradients: the final hidden states [s, b, h] of every microbatch, on the last stage.

    Other stages get an empty list. Under sequence parallelism each rank gets its part of s. `begin` as in
    `run_schedule`; `groups` are the model's, where it has groups of its own. Every rank calls.
    """

    def forward_step(iterator: Iterator[Microbatch], model: torch.nn.Module) -> Any:
        microbatch = next(iterator)
        if begin is not None:
            begin(unwrap(model), microbatch)
        return model(microbatch.tokens, microbatch.position_ids, None), _keep

    own: dict[str, Any] = {}
    if groups is not None:
        own["p2p_communicator"] = P2PCommunicator(groups.pp, unwrap(chunks[0]).config)
        own["pg_collection"] = groups
    with torch.no_grad():
        return _call_schedule(chunks, batch, forward_step, forward_only=True, collect_non_loss_data=True, **own)


def _keep(hidden: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
    return hidden


def forward_only(
    chunks: list[LanguageModel], batch: list[Microbatch], after: Callable[[LanguageModel, Microbatch], None]
) -> None:
    """Forward only, no gradients, nothing kept: hooks take what is wanted. Every rank calls.

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
        hidden = model(microbatch.tokens, microbatch.position_ids, None)
        after(unwrap(model), hidden, microbatch)
        return hidden, _drop

    with torch.no_grad():
        _call_schedule(list(chunks), batch, forward_step, forward_only=True, collect_non_loss_data=True)


def _drop(hidden: torch.Tensor, non_loss_data: bool = True) -> None:
    return None


def _call_schedule(
    chunks: list[torch.nn.Module], batch: list[Microbatch], forward_step: Callable[..., Any], **options: Any
) -> list[Any]:
    config = unwrap(chunks[0]).config
    schedule = get_forward_backward_func(
        config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    )
    micro_batch_size, sequence_length = batch[0].tokens.shape
    interleaved = len(chunks) > 1
    return schedule(
        forward_step_func=forward_step,
        data_iterator=[iter(batch) for _ in chunks] if interleaved else iter(batch),
        model=chunks if interleaved else chunks[0],
        num_microbatches=len(batch),
        seq_length=sequence_length * config.context_parallel_size,  # of the whole: Megatron divides
        micro_batch_size=micro_batch_size,
        **options,
    )


def _mean_over_tokens(rows: list[dict[str, torch.Tensor]], stage_sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """Sum over microbatches and data-parallel ranks, give it to every stage, divide by the number of tokens; beside it
    the `stage_sums` of all stages."""
    box: list[Any] = [None]
    if rows:
        names = list(rows[0])
        total = torch.stack([torch.stack([row[name].double() for name in names]) for row in rows]).sum(0)
        torch.distributed.all_reduce(total, group=data_group(with_context=True))
        box = [dict(zip(names, total.tolist(), strict=True))]
    stages = pipeline_group()
    if stages.size() > 1:
        last = torch.distributed.get_global_rank(stages, stages.size() - 1)
        torch.distributed.broadcast_object_list(box, src=last, group=stages)
    sums: dict[str, float] = box[0]
    if stage_sums:
        total = torch.stack([value.detach().double() for value in stage_sums.values()])
        torch.distributed.all_reduce(total, group=data_group(with_context=True))
        torch.distributed.all_reduce(total, group=stages)
        sums |= dict(zip(stage_sums, total.tolist(), strict=True))
    count = sums["num_tokens"] or 1.0
    return {name: value if name == "num_tokens" else value / count for name, value in sums.items()}
