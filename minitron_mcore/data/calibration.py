"""The samples that importance is measured on: drawn by seed, the same at every layout."""

from __future__ import annotations

import random
from collections.abc import Iterator

from minitron_mcore.data.dataset import Batch, Dataset, batches_once
from minitron_mcore.data.described import check_num_samples


def draw_samples(dataset: Dataset, num_samples: int, seed: int) -> list[int]:
    """`num_samples` different sample numbers of `dataset`, in the order they are scored. Raises InputError."""
    check_num_samples(num_samples, len(dataset))
    return random.Random(seed).sample(range(len(dataset)), num_samples)


def calibration_batches(
    dataset: Dataset,
    *,
    num_samples: int,
    micro_batch_size: int,
    seed: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """This rank's calibration microbatches: the fields of `data.dataset.batches` and `valid` fp32 [b].

    The same samples are drawn at every layout and micro batch size, without replacement, and each is given once, to one
    data-parallel rank; every rank gets `data.dataset.num_rounds` microbatches. Where samples run out, fillers with
    `valid` 0 and `loss_mask` 0 stand in: multiply by `valid` before adding up. No communication. Raises InputError.
    """
    return batches_once(
        dataset,
        draw_samples(dataset, num_samples, seed),
        micro_batch_size=micro_batch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
        num_workers=num_workers,
    )
