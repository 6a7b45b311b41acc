"""Datasets -> global batches of this data-parallel rank, on the device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy

from minitron_mcore.data.dataset import Batch, batches
from minitron_mcore.distillation.cache.file import token_checksum
from minitron_mcore.model.microbatch import Microbatch, to_device
from minitron_mcore.runtime.groups import data_group
from minitron_mcore.training.budget import Step, Timetable

# (first sample, how many global batches) -> this rank's global batches, each a list of microbatches.
BatchReader = Callable[[int, int], Iterator[list[Microbatch]]]
# (timetable, finished iterations) -> the steps that are left, each with this rank's global batch.
StepReader = Callable[[Timetable, int], Iterator[tuple[Step, list[Microbatch]]]]


def batch_reader(dataset: Any, *, global_batch_size: int, micro_batch_size: int, num_workers: int = 0) -> BatchReader:
    """Reads `dataset` in Megatron's order: which samples make a global batch is the same at every layout."""

    def read(first_sample: int, number: int) -> Iterator[list[Microbatch]]:
        stream = _stream(dataset, first_sample, global_batch_size, micro_batch_size, num_workers)
        for _ in range(number):
            yield _next_batch(stream, global_batch_size, micro_batch_size)

    return read


def step_reader(datasets: dict[int, Any], *, num_workers: int = 0) -> StepReader:
    """Reads each phase from the dataset of its sequence length, in Megatron's order."""

    def read(timetable: Timetable, iteration: int) -> Iterator[tuple[Step, list[Microbatch]]]:
        for _, steps in itertools.groupby(timetable.steps(iteration), key=lambda step: step.shape.phase):
            first = next(steps)
            shape = first.shape
            # One stream for all batch sizes of a ramp-up: the order of samples does not depend on them.
            stream = _stream(
                datasets[shape.sequence_length],
                first.first_sample,
                shape.global_batch_size,
                shape.micro_batch_size,
                num_workers,
            )
            for step in itertools.chain([first], steps):
                yield step, _next_batch(stream, step.shape.global_batch_size, shape.micro_batch_size)

    return read


def data_order(datasets: dict[int, Any]) -> dict[int, str]:
    """Of training sets by their sequence lengths, a fingerprint of the samples that each gives first. Any rank calls.

    Megatron shuffles all passes over a text at once, so that another number of them begins otherwise.
    """
    return {
        length: token_checksum(
            numpy.concatenate([dataset[number]["tokens"].numpy() for number in range(min(8, len(dataset)))])
        )
        for length, dataset in datasets.items()
    }


def _stream(
    dataset: Any, first_sample: int, global_batch_size: int, micro_batch_size: int, num_workers: int
) -> Iterator[Batch]:
    return batches(
        dataset,
        consumed_samples=first_sample,
        micro_batch_size=micro_batch_size,
        data_parallel_rank=data_group().rank(),
        data_parallel_size=data_group().size(),
        global_batch_size=global_batch_size,
        num_workers=num_workers,
    )


def _next_batch(stream: Iterator[Batch], global_batch_size: int, micro_batch_size: int) -> list[Microbatch]:
    count = global_batch_size // (micro_batch_size * data_group().size())
    return [to_device(microbatch) for microbatch in itertools.islice(stream, count)]
