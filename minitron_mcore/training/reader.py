"""Datasets -> global batches of this data-parallel rank, on the device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state

from minitron_mcore.data.dataset import batches
from minitron_mcore.model.schedule import Microbatch

# (first sample, how many global batches) -> this rank's global batches, each a list of microbatches.
BatchReader = Callable[[int, int], Iterator[list[Microbatch]]]


def batch_reader(dataset: Any, *, global_batch_size: int, micro_batch_size: int, num_workers: int = 0) -> BatchReader:
    """Reads `dataset` in Megatron's order: which samples make a global batch is the same at every layout."""
    data_parallel = parallel_state.get_data_parallel_world_size()
    count = global_batch_size // (micro_batch_size * data_parallel)

    def read(first_sample: int, number: int) -> Iterator[list[Microbatch]]:
        stream = batches(
            dataset,
            consumed_samples=first_sample,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=data_parallel,
            global_batch_size=global_batch_size,
            num_workers=num_workers,
        )
        for _ in range(number):
            yield [to_device(microbatch) for microbatch in itertools.islice(stream, count)]

    return read


def to_device(microbatch: Microbatch) -> Microbatch:
    device = torch.cuda.current_device()
    return {name: value.to(device, non_blocking=True) for name, value in microbatch.items()}
