"""One pass over a global batch with Megatron's schedules: training, evaluation, scoring and teacher alike.

Legend: s sequence (under context parallelism a rank's part of it), b micro-batch, h hidden size. A batch is a list of
microbatches; every rank of a data-parallel replica holds the same.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection

from minitron_mcore.model.gpt import LanguageModel, unwrap
from minitron_mcore.model.microbatch import Microbatch, uncounted
from minitron_mcore.model.packing import Packed
from minitron_mcore.runtime.groups import data_group, pipeline_group
from minitron_mcore.runtime.overlap import gradients_held
from minitron_mcore.runtime.pulse import PULSE
from minitron_mcore.runtime.repairs import divide_gradients

# (loss to train, number of counted tokens, sums to report), all summed over the microbatch's tokens.
LossSums = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
LossFunction = Callable[[LanguageModel, torch.Tensor, Microbatch], LossSums]
Begin = Callable[[LanguageModel, Microbatch], None]
Visit = Callable[[LanguageModel, torch.Tensor, Microbatch], Any]  # a chunk, its output, what it ran

_LETTERS, _SUMS = 1024, 64  # room for the names of sums, and for the sums
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
    window: microbatches a call of Megatron's schedule, 0 for all of them; `prepare` gets them before the call.
    begin: called before a chunk runs a microbatch; a collective in it may be over tensor-parallel ranks alone.
    stage_sums: called at the end: further sums of this pipeline stage, of the same names on every rank.

    Gradients are left divided by the global number of counted tokens (the sum of the loss masks, which need not be
    whole). Returns each sum over microbatches, stages and data-parallel ranks, divided likewise. Every rank calls."""
    counted = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())

    def loss_of(chunk: LanguageModel, hidden: torch.Tensor, microbatch: Microbatch) -> LossSums | None:
        if not chunk.post_process:
            return None
        total, num_tokens, sums = loss(chunk, hidden, microbatch)
        counted.add_(num_tokens.detach())
        return total, num_tokens.detach().to(torch.int), {"num_tokens": num_tokens.detach(), **sums}

    rows, config, size = [], unwrap(chunks[0]).config, window or len(batch)
    # Megatron would finalise gradients in each call, by a whole number of tokens.
    finalize, config.finalize_model_grads_func = config.finalize_model_grads_func, None
    try:
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            if prepare is not None:
                prepare(part)
            more = start + size < len(batch) and not forward_only
            with gradients_held(config, chunks) if more else nullcontext():
                rows += _call_schedule(chunks, part, loss_of, begin, forward_only=forward_only)
    finally:
        config.finalize_model_grads_func = finalize
    if finalize is not None and not forward_only:
        finalize(chunks, None)
        divide_gradients(chunks, counted)
    return _mean_over_tokens(rows, stage_sums() if stage_sums is not None else {})


@contextmanager
def evaluating(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Within the `with`, the chunks are in evaluation mode and no gradients are kept; afterwards as they were."""
    before = [chunk.training for chunk in chunks]
    try:
        for chunk in chunks:
            chunk.eval()
        with torch.no_grad():
            yield
    finally:
        for chunk, was_training in zip(chunks, before, strict=True):
            chunk.train(was_training)


def in_calls(batches: Iterable[Microbatch], *, interleaved: bool, each: int = GROUP) -> Iterator[list[Microbatch]]:
    """`batches` cut for one call of a schedule after another, `each` microbatches a pipeline stage at a time.

    The interleaved schedule takes multiples of the number of stages: the last call is filled up with `uncounted`
    copies of its last microbatch. Batches are read as they are needed.
    """
    stages = pipeline_group().size()
    stream = iter(batches)
    while group := list(itertools.islice(stream, each * stages)):
        missing = -len(group) % stages if interleaved else 0
        yield group + [uncounted(group[-1]) for _ in range(missing)]


def forward_only(
    chunks: Sequence[torch.nn.Module],
    batch: list[Microbatch],
    visit: Visit,
    *,
    begin: Begin | None = None,
    groups: ProcessGroupCollection | None = None,
) -> list[Any]:
    """Forward only, no gradients: what `visit` gives on the last stage, by microbatch; an empty list on the others.
    It is called before another microbatch starts; a collective in it may be over tensor-parallel ranks alone: pipeline
    stages are at different microbatches. groups: the model's, where it has groups of its own. Every rank calls."""
    how: dict[str, Any] = {"forward_only": True, "collect_non_loss_data": True}
    if groups is not None:
        how |= {"p2p_communicator": P2PCommunicator(groups.pp, unwrap(chunks[0]).config), "pg_collection": groups}
    with torch.no_grad():
        return _call_schedule(chunks, batch, visit, begin, **how)


def final_hidden_states(chunks: Sequence[torch.nn.Module], batch: list[Microbatch], **how: Any) -> list[torch.Tensor]:
    """The final hidden states [s, b, h] of every microbatch, this rank's part of s under sequence parallelism; on other
    stages than the last an empty list. As `forward_only`."""
    return forward_only(chunks, batch, lambda chunk, hidden, microbatch: hidden, **how)


def visit_final_states(chunks: Sequence[torch.nn.Module], batch: list[Microbatch], visit: Visit) -> None:
    """On the last stage `visit(chunk, final hidden states, microbatch)`, and nothing kept. As `forward_only`."""
    forward_only(chunks, batch, lambda chunk, *rest: visit(chunk, *rest) if chunk.post_process else None)


def _call_schedule(
    chunks: Sequence[torch.nn.Module], batch: list[Microbatch], visit: Visit, begin: Begin | None, **how: Any
) -> list[Any]:
    """One call of Megatron's schedule: what `visit` gives on the last stage, by microbatch."""

    def forward_step(iterator: Iterator[Microbatch], model: torch.nn.Module) -> Any:
        microbatch, chunk = next(iterator), unwrap(model)
        PULSE.move()
        if begin is not None:
            begin(chunk, microbatch)
        params = None if microbatch.packed is None else sequence_params(microbatch.packed)
        output = model(microbatch.tokens, microbatch.position_ids, None, packed_seq_params=params)
        found = visit(chunk, output, microbatch)
        return output, lambda *args, **kwargs: found

    config, (micro_batch_size, sequence_length) = unwrap(chunks[0]).config, batch[0].tokens.shape
    assert all(microbatch.tokens.shape == batch[0].tokens.shape for microbatch in batch), (
        "what stages send has one shape"
    )
    sizes = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    return get_forward_backward_func(*sizes)(
        forward_step_func=forward_step,
        data_iterator=[iter(batch) for _ in chunks] if len(chunks) > 1 else iter(batch),
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batch),
        seq_length=sequence_length * config.context_parallel_size,  # of the whole: Megatron divides
        micro_batch_size=micro_batch_size,
        **how,
    )


def sequence_params(packed: Packed) -> PackedSeqParams:
    """Where packed segments lie, in Megatron's words; every pipeline stage needs it."""
    where = {"cu_seqlens_q": packed.boundaries, "cu_seqlens_kv": packed.boundaries}
    return PackedSeqParams("thd", **where, max_seqlen_q=packed.longest, max_seqlen_kv=packed.longest)


@functools.cache
def _letters(names: str, device: Any) -> torch.Tensor:
    """Kept, since a copy to the device would make the host wait for it."""
    assert len(names) <= _LETTERS, f"room for {_LETTERS} letters, not for {names}"
    return torch.tensor([*names.encode(), *[0] * (_LETTERS - len(names))], dtype=torch.float64, device=device)


def _mean_over_tokens(rows: list[dict[str, torch.Tensor]], stage_sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """Sums over microbatches, stages and data-parallel ranks, divided by the number of tokens; equal on all ranks.
    The host waits for the device once."""
    stages, device = pipeline_group(), torch.cuda.current_device()
    values = [torch.stack([value.detach().double() for value in row.values()]) for row in rows]
    sums = torch.stack(values).sum(0) if values else torch.zeros(0, dtype=torch.float64, device=device)
    if stage_sums:
        sums = torch.cat([torch.stack([value.detach().double() for value in stage_sums.values()]), sums])
    torch.distributed.all_reduce(sums, group=data_group(with_context=True))
    names = "\n".join(rows[0]) if rows else ""
    if stages.size() > 1:
        # Which sums there are only the last stage knows: their names go with them, a number each character.
        box = torch.cat([_letters(names, device), torch.zeros(_SUMS, dtype=torch.float64, device=device)])
        box[_LETTERS : _LETTERS + len(sums)] = sums
        torch.distributed.all_reduce(box, group=stages)
        told = box.tolist()
        names, found = bytes(int(letter) for letter in told[:_LETTERS] if letter).decode(), told[_LETTERS:]
    else:
        found = sums.tolist()
    own = dict(zip(stage_sums, found, strict=False))
    totals = dict(zip(names.split("\n"), found[len(own) :], strict=False)) | own
    count = totals["num_tokens"] or 1.0
    return {name: value if name == "num_tokens" else value / count for name, value in totals.items()}
