"""Log-likelihoods of continuations, at any layout: the answers to questions (questions.py), and what the LM Evaluation
Harness asks (harness/).

A row is (token ids of context and continuation, how many of the first are given). Rows that read the same tokens, as a
question's choices of one token each do, share a pass through the model; the output head sees scored tokens alone.

Legend: b sequences of a micro-batch, s their tokens, padded to the longest; N scored tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from minitron_mcore.data.dataset import batches_once
from minitron_mcore.evaluation.token_values import chosen_values, over_world, whole_sequences
from minitron_mcore.model.gpt import LanguageModel
from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.model.schedule import GROUP, in_calls, visit_final_states
from minitron_mcore.runtime.groups import data_group, data_place, pipeline_group, tensor_group

Row = tuple[Sequence[int], int]


@dataclass(frozen=True)
class Answers:
    """By row: the log-likelihood, summed over the scored tokens, float64 [rows]; and whether each of them was the
    likeliest there, bool [rows]."""

    sums: numpy.ndarray
    greedy: numpy.ndarray


@dataclass(frozen=True)
class Inputs:
    """The different token sequences that rows read, and the rows that read each."""

    sequences: list[tuple[int, ...]]
    readers: list[list[int]]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Inputs:
        found: dict[tuple[int, ...], list[int]] = {}
        for number, (sequence, _) in enumerate(rows):
            found.setdefault(tuple(sequence[:-1]), []).append(number)
        return cls(list(found), list(found.values()))


def padded(sequence: Sequence[int], length: int) -> dict[str, torch.Tensor]:
    """A sample of `length` tokens that reads `sequence`, padded on the right."""
    tokens = torch.zeros(length, dtype=torch.int64)
    tokens[: len(sequence)] = torch.tensor(sequence)
    return {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(length), "position_ids": torch.arange(length)}


def input_batches(
    sequences: Sequence[Any],
    micro_batch_size: int,
    group: int,
    length_multiple: int = 1,
    sample: Callable[[Any, int], dict[str, torch.Tensor]] = padded,
    /,
    **place: int,
) -> Iterator[Iterator[Microbatch]]:
    """The microbatches of all sequences for the data-parallel rank at `place` (data_parallel_rank,
    data_parallel_size), at most `group` at a time for one call of a schedule.

    Sequences are sorted by length, the longest first, because those of one call are padded to one length (a multiple
    of `length_multiple`: tensor-parallel ranks, under sequence parallelism). Every rank gets equally many microbatches;
    fillers are not `valid`. `samples` are the sequences' numbers. Padding is on the right: no token sees it.
    sample: makes a sample of a sequence and a length; of token ids by default.
    """
    order = sorted(range(len(sequences)), key=lambda number: (-len(sequences[number]), number))
    together = group * micro_batch_size * place["data_parallel_size"]
    for begin in range(0, len(order), together):
        numbers = order[begin : begin + together]
        length = len(sequences[numbers[0]])
        length += -length % length_multiple
        samples = {number: sample(sequences[number], length) for number in numbers}
        yield map(Microbatch.of, batches_once(samples, numbers, micro_batch_size=micro_batch_size, **place))


def log_likelihoods(
    chunks: Sequence[LanguageModel], rows: Sequence[Row], vocab_size: int, micro_batch_size: int = 1
) -> Answers:
    """The answers to `rows`, each of which reads at least one token and scores at least one.

    One forward pass over the rows' different inputs, `micro_batch_size` of them at a time. Every rank calls; the same
    on every rank.
    """
    device = next(chunks[0].parameters()).device
    inputs = Inputs.of(rows)
    multiple = tensor_group().size() if chunks[0].config.sequence_parallel else 1
    totals = torch.zeros(2, len(rows), dtype=torch.float64, device=device)  # losses, tokens that are not the likeliest

    def visit(chunk: LanguageModel, hidden_SBH: torch.Tensor, microbatch: Microbatch) -> None:
        hidden_SBH, (positions, places, labels, owners) = whole_sequences(chunk, hidden_SBH), scored(microbatch)
        if not owners:
            return
        labels_N, owners_N = torch.tensor([labels, owners], device=device)
        loss_N, greedy_N = chosen_values(chunk, hidden_SBH[positions, places], labels_N, vocab_size=vocab_size)
        totals.index_add_(1, owners_N, torch.stack([loss_N, 1 - greedy_N]))

    def scored(microbatch: Microbatch) -> tuple[list[int], ...]:
        """Of every scored token: position, place in the micro-batch, label, and its row."""
        assert microbatch.samples is not None and microbatch.valid is not None
        found = [
            (position, place, row, owner)
            for place, (sample, valid) in enumerate(zip(microbatch.samples.tolist(), microbatch.valid, strict=True))
            if valid and not microbatch.is_filler
            for owner in inputs.readers[sample]
            for position, row in enumerate(rows[owner][0][rows[owner][1] :], rows[owner][1] - 1)
        ]
        return tuple(map(list, zip(*found, strict=True))) if found else ([], [], [], [])

    for batches in input_batches(inputs.sequences, micro_batch_size, rows_group(), multiple, **data_place()):
        for call in in_calls((microbatch.to(device) for microbatch in batches), interleaved=len(chunks) > 1):
            visit_final_states(list(chunks), call, visit)
    losses, misses = over_world(totals, chunks).cpu().numpy()
    return Answers(-losses, misses == 0)


def rows_group() -> int:
    """Microbatches of a data-parallel rank in one call of the schedule."""
    return GROUP * pipeline_group().size()


def rows_at_once(micro_batch_size: int) -> int:
    """How many inputs keep every rank busy in one call of the schedule; the groups must stand."""
    return rows_group() * data_group().size() * micro_batch_size
