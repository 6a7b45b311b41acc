"""The log-likelihoods of multiple-choice answers (questions.py), at any layout.

Legend: b rows of a micro-batch, a row being one choice of one question; s its tokens, padded to the longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy
import torch

from minitron_mcore.evaluation.questions import Task
from minitron_mcore.evaluation.token_values import over_world, token_values
from minitron_mcore.model.gpt import LanguageModel
from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.model.schedule import GROUP, visit_final_states
from minitron_mcore.runtime.groups import data_group, pipeline_group, tensor_group


def row_batches(
    task: Task,
    *,
    micro_batch_size: int,
    group: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    count_multiple: int = 1,
    length_multiple: int = 1,
) -> Iterator[list[Microbatch]]:
    """This data-parallel rank's microbatches of all rows, in lists of at most about `group` for one call of a schedule.

    Rows are sorted by length, the longest first, because those of one list are padded to one length (a multiple of
    `length_multiple`: tensor-parallel ranks, under sequence parallelism). Every rank gets equally many lists with
    equally many microbatches (a multiple of `count_multiple`: pipeline stages, if the schedule is interleaved); fillers
    have mask 0. `samples` are the rows' numbers in `task.rows`. Padding is on the right, where no token sees it.
    """
    rows = task.rows
    order = sorted(range(len(rows)), key=lambda number: (-len(rows[number][0]), number))
    round_size = micro_batch_size * data_parallel_size
    for begin in range(0, len(order), group * round_size):
        numbers = order[begin : begin + group * round_size]
        length = len(rows[numbers[0]][0]) - 1
        length += -length % length_multiple
        count = -(-len(numbers) // round_size)
        count += -count % count_multiple
        batch = []
        for index in range(count):
            first = (index * data_parallel_size + data_parallel_rank) * micro_batch_size
            batch.append(_microbatch(rows, numbers[first : first + micro_batch_size], micro_batch_size, length))
        yield batch


def _microbatch(
    rows: Sequence[tuple[tuple[int, ...], int]], numbers: Sequence[int], size: int, length: int
) -> Microbatch:
    tokens, labels = torch.zeros(2, size, length, dtype=torch.int64)
    mask = torch.zeros(size, length)
    for place, number in enumerate(numbers):
        sequence, given = rows[number]
        read = len(sequence) - 1
        tokens[place, :read] = torch.tensor(sequence[:-1])
        labels[place, :read] = torch.tensor(sequence[1:])
        mask[place, given - 1 : read] = 1
    positions = torch.arange(length).expand(size, length).contiguous()
    samples = torch.tensor([*numbers, *[0] * (size - len(numbers))], dtype=torch.int64)
    return Microbatch(tokens, labels, mask, positions, samples)


def log_likelihoods(
    chunks: Sequence[LanguageModel], task: Task, vocab_size: int, micro_batch_size: int = 1
) -> numpy.ndarray:
    """Log-likelihood of every row of `task.rows`, summed over the choice's tokens: float64 [rows].

    One forward pass over all rows. Every rank calls; the same on every rank.
    """
    device = next(chunks[0].parameters()).device
    stages = pipeline_group().size()
    sharded = chunks[0].config.sequence_parallel
    groups = row_batches(
        task,
        micro_batch_size=micro_batch_size,
        group=GROUP * stages,
        data_parallel_rank=data_group().rank(),
        data_parallel_size=data_group().size(),
        count_multiple=stages if len(chunks) > 1 else 1,
        length_multiple=tensor_group().size() if sharded else 1,
    )
    totals = torch.zeros(len(task.rows), dtype=torch.float64, device=device)

    def visit(chunk: LanguageModel, hidden_SBH: torch.Tensor, microbatch: Microbatch) -> None:
        loss_SB = token_values(chunk, hidden_SBH, microbatch.labels, vocab_size=vocab_size).loss
        mask_SB = microbatch.loss_mask.transpose(0, 1).double()
        assert microbatch.samples is not None
        totals.index_add_(0, microbatch.samples, -(loss_SB * mask_SB).sum(0))

    for group in groups:
        visit_final_states(list(chunks), [microbatch.to(device) for microbatch in group], visit)
    return over_world(totals, chunks).cpu().numpy()
