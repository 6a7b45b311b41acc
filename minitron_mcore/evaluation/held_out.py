"""Held-out text: which sequences, and their microbatches, each counted once."""

from __future__ import annotations

from collections.abc import Iterator

from minitron_mcore.data.config import DataConfig
from minitron_mcore.data.dataset import Dataset, batches_once, build_datasets
from minitron_mcore.data.described import held_out_part
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.model.microbatch import Microbatch, to_device
from minitron_mcore.model.schedule import in_calls
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.runtime.groups import data_place


def held_out(data: DataConfig, tokenizer: Tokenizer | None, samples: int, *, seed: int) -> Dataset:
    """The validation set: one pass, so that no sequence counts twice; a weighted blend in its proportions, of `samples`
    sequences. Every rank calls. Raises InputError."""
    (valid,) = build_datasets(data, tokenizer, [held_out_part(data, samples)], seed=seed)
    assert valid is not None
    return valid


def held_out_batches(
    dataset: Dataset, samples: int, *, micro_batch_size: int, parallel: ParallelConfig
) -> Iterator[list[Microbatch]]:
    """The first `samples` sequences of this data-parallel rank, a few pipelines' fill of microbatches at a time, on the
    device. The interleaved schedule needs a multiple of the stages: uncounted copies fill the last group."""
    microbatches = batches_once(dataset, range(samples), micro_batch_size=micro_batch_size, **data_place())
    return in_calls(map(to_device, microbatches), interleaved=parallel.virtual_pipeline is not None, each=4)
