"""The log-likelihoods of multiple-choice answers (questions.py), at any layout.

Legend: b rows of a micro-batch, a row being one choice of one question; s its tokens, padded to the longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy
import torch

from minitron_mcore.data.dataset import batches_once
from minitron_mcore.evaluation.questions import Task
from minitron_mcore.evaluation.token_values import over_world, token_values
from minitron_mcore.model.gpt import LanguageModel
from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.model.schedule import GROUP, in_calls, visit_final_states
from minitron_mcore.runtime.groups import data_place, pipeline_group, tensor_group


def row_batches(
    task: Task, micro_batch_size: int, group: int, length_multiple: int = 1, **place: int
) -> Iterator[Iterator[Microbatch]]:
    """The microbatches of all rows for the data-parallel rank at `place` (data_parallel_rank, data_parallel_size),
    at most `group` at a time for one call of a schedule.

    Rows are sorted by length, the longest first, because those of one call are padded to one length (a multiple of
    `length_multiple`: tensor-parallel ranks, under sequence parallelism). Every rank gets equally many microbatches;
    fillers have mask 0. `samples` are the rows' numbers in `task.rows`. Padding is on the right: no token sees it.
    """
    rows = task.rows
    order = sorted(range(len(rows)), key=lambda number: (-len(rows[number][0]), number))
    together = group * micro_batch_size * place["data_parallel_size"]
    for begin in range(0, len(order), together):
        numbers = order[begin : begin + together]
        length = len(rows[numbers[0]][0]) - 1
        length += -length % length_multiple
        padded = {number: _padded(*rows[number], length) for number in numbers}
        yield map(Microbatch.of, batches_once(padded, numbers, micro_batch_size=micro_batch_size, **place))


def _padded(sequence: Sequence[int], given: int, length: int) -> dict[str, torch.Tensor]:
    read = len(sequence) - 1
    tokens, labels = torch.zeros(2, length, dtype=torch.int64)
    tokens[:read], labels[:read] = torch.tensor(sequence[:-1]), torch.tensor(sequence[1:])
    mask = torch.zeros(length)
    mask[given - 1 : read] = 1
    return {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": torch.arange(length)}


def log_likelihoods(
    chunks: Sequence[LanguageModel], task: Task, vocab_size: int, micro_batch_size: int = 1
) -> numpy.ndarray:
    """Log-likelihood of every row of `task.rows`, summed over the choice's tokens: float64 [rows].

    One forward pass over all rows. Every rank calls; the same on every rank.
    """
    device = next(chunks[0].parameters()).device
    group = GROUP * pipeline_group().size()
    multiple = tensor_group().size() if chunks[0].config.sequence_parallel else 1
    totals = torch.zeros(len(task.rows), dtype=torch.float64, device=device)

    def visit(chunk: LanguageModel, hidden_SBH: torch.Tensor, microbatch: Microbatch) -> None:
        (loss_SB,) = token_values(chunk, hidden_SBH, microbatch.labels, vocab_size=vocab_size)
        mask_SB = microbatch.loss_mask.transpose(0, 1).double()
        assert microbatch.samples is not None
        totals.index_add_(0, microbatch.samples, -(loss_SB * mask_SB).sum(0))

    for rows in row_batches(task, micro_batch_size, group, multiple, **data_place()):
        for call in in_calls((microbatch.to(device) for microbatch in rows), interleaved=len(chunks) > 1):
            visit_final_states(list(chunks), call, visit)
    return over_world(totals, chunks).cpu().numpy()
