"""Datasets of fixed-length samples from token files, and the microbatches that training reads from them.

Legend: b micro batch size, s sequence length.
"""

from __future__ import annotations

import glob
import itertools
import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Optional, Protocol

import numpy
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from minitron_mcore.data.blend import check_prefixes, surplus
from minitron_mcore.data.config import DataConfig
from minitron_mcore.data.described import Described, Part, check_num_samples, describe
from minitron_mcore.data.index import cache_folder, digest_of
from minitron_mcore.data.opened import note_opened
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.runtime.agree import all_or_none, on_main
from minitron_mcore.runtime.interrupt import held_back, outlive_signals

Batch = dict[str, torch.Tensor]

FIELDS = ("tokens", "labels", "loss_mask", "position_ids")
SPLITS = ("train", "valid", "test")


class Dataset(Protocol):
    """Samples by number, each with FIELDS, or its own `fields`, as tensors [s], or [k, s] where a sample is k rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def build_datasets(
    data: DataConfig, tokenizer: Optional[Tokenizer], parts: Sequence[Part], *, seed: int
) -> list[Optional[Dataset]]:
    """Megatron's GPT dataset of each of `parts`; None of one that nobody asked for, where there is too little of it.

    Each holds at least the samples asked for, going through its text as often as that takes; a size of None asks for
    every sample of one pass. Documents and samples are shuffled by `seed`; the order also depends on the number of
    passes. Every rank calls it, with process groups or without; the first writes the index cache. Raises InputError,
    on every rank if on one.
    """
    assert tokenizer is not None, "the tokenizer is promised: resolve the job again before it acts"

    def check() -> tuple[Described, str]:
        described = describe(data, parts, tokenizer)
        # Megatron keys its cache by the files' names; the digest keeps the indices of overwritten files apart.
        cache = os.path.join(cache_folder(data, parts[0].blend), digest_of(described.sources)[:16])
        _prepare_cache(cache)
        return described, cache

    # Every rank sees that the files are there; the first looks thoroughly, since that reads whole indices.
    all_or_none(lambda: check_prefixes([part.blend for part in parts]))
    described, cache = on_main(check)
    note_opened(described.sources)
    return [None if part.tokens is None else _build(data, tokenizer, part, seed, cache) for part in described.parts]


def draw_samples(dataset: Dataset, num_samples: int, seed: int) -> list[int]:
    """`num_samples` different sample numbers of `dataset`, in the order importance is measured on them; the same at
    every layout. Raises InputError."""
    check_num_samples(num_samples, len(dataset))
    return random.Random(seed).sample(range(len(dataset)), num_samples)


def batches(
    dataset: Dataset,
    *,
    consumed_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    global_batch_size: int,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """This rank's microbatches, without end: `tokens`, `labels`, `position_ids` int64 and `loss_mask` fp32, all [b, s],
    and `samples` int64 [b], the samples' numbers in the dataset. Samples of k rows give [b, k, s].

    Megatron's order. A global batch is the next `global_batch_size` samples whatever the layout; its k-th microbatch
    on rank r is the b samples from (k * data_parallel_size + r) * b on. After the last sample the first one follows.
    Restarting with the samples consumed so far gives the same batches. On the CPU (pinned for CUDA). Raises InputError.
    """
    if micro_batch_size < 1 or global_batch_size < 1 or global_batch_size % (micro_batch_size * data_parallel_size):
        rule = f"must be a multiple of micro_batch_size={micro_batch_size} times the data-parallel size"
        raise InputError("global_batch_size", global_batch_size, f"{rule} {data_parallel_size}", "change one of them")
    stride = micro_batch_size * data_parallel_size
    start = consumed_samples + data_parallel_rank * micro_batch_size
    order = ([(i + k) % len(dataset) for k in range(micro_batch_size)] for i in itertools.count(start, stride))
    return _read(_Samples(dataset, range(len(dataset))), order, num_workers, (*_fields(dataset), "samples"))


def batches_once(
    dataset: Dataset,
    samples: Sequence[int],
    *,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """This rank's microbatches of exactly `samples`, each of them once among the ranks, in the order of `batches`.

    Every rank gets as many, all of full size; where the samples run out, fillers take their place, with `loss_mask` all
    0. Beside the fields of `batches`, `valid` fp32 [b] is 1 for a sample and 0 for a filler: multiply by it before
    adding up. No communication.
    """
    stride = micro_batch_size * data_parallel_size
    starts = range(data_parallel_rank * micro_batch_size, -(-len(samples) // stride) * stride, stride)
    order = [list(range(start, start + micro_batch_size)) for start in starts]
    return _read(_Samples(dataset, samples), order, num_workers, (*_fields(dataset), "samples", "valid"))


class _Samples:
    """The chosen samples of a dataset, with their numbers there, and fillers at every position beyond."""

    def __init__(self, dataset: Dataset, samples: Sequence[int]) -> None:
        self.dataset, self.samples = dataset, samples

    def __getitem__(self, position: int) -> dict[str, Any]:
        is_sample = position < len(self.samples)
        number = self.samples[position if is_sample else 0]
        sample = self.dataset[number]
        if not is_sample:
            sample = {**sample, "loss_mask": torch.zeros_like(sample["loss_mask"])}
            if "segments" in sample:  # none of a filler's is there
                sample["segments"] = torch.full_like(sample["segments"], -1)
        return {**sample, "samples": torch.tensor(number), "valid": torch.tensor(float(is_sample))}


def _read(dataset: _Samples, order: Any, num_workers: int, fields: tuple[str, ...]) -> Iterator[Batch]:
    loader: torch.utils.data.DataLoader = torch.utils.data.DataLoader(
        dataset,  # type: ignore[arg-type]  # a dataset by its methods
        batch_sampler=order,
        collate_fn=partial(_collate, fields),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=outlive_signals,
    )
    with held_back():  # a Ctrl-C that met a reader just forked would be told to this process as a second one
        return iter(loader)


def _collate(fields: tuple[str, ...], samples: list[dict[str, Any]]) -> Batch:
    return {name: torch.stack([sample[name] for sample in samples]) for name in fields}


def _fields(dataset: Dataset) -> tuple[str, ...]:
    return tuple(getattr(dataset, "fields", FIELDS))


def _build(data: DataConfig, tokenizer: Tokenizer, part: Part, seed: int, cache: str) -> Dataset:
    blend = part.blend
    weights: Optional[list[float]] = None
    if part.size is not None and len(blend.prefixes) > 1:
        # Without weights Megatron stops after one pass; token counts as weights mix alike and go on.
        weights = [float(weight) for weight in blend.weights or part.tokens or ()]
    config = GPTDatasetConfig(
        random_seed=seed % 2**32,
        sequence_length=part.sequence_length,
        blend=(list(blend.prefixes), weights),
        split="1",
        path_to_cache=cache,
        tokenizer=tokenizer,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=False,
        eod_mask_loss=data.eod_mask_loss,
        create_attention_mask=False,
        mid_level_dataset_surplus=surplus(blend, part.size or 0),
    )
    split = SPLITS.index(part.name)
    # One part at a time, so that a part nobody asked for need not have documents.
    config.split_matrix = [part.share if i == split else None for i in range(len(SPLITS))]
    sizes = [part.size if i == split else 0 for i in range(len(SPLITS))]
    with _some_group(needed=len(blend.prefixes) > 1):
        return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[split]


def _prepare_cache(folder: str) -> None:
    """Make the cache folder, and drop indices that a killed run left half-written, and what else is no array: Megatron
    would trust them, and unpickle what is no array."""
    try:
        os.makedirs(folder, exist_ok=True)
        for path in glob.glob(os.path.join(glob.escape(folder), "*.npy")):
            try:
                is_array = isinstance(numpy.load(path, mmap_mode="r"), numpy.ndarray)
            except OSError:
                raise
            except Exception:  # of a header that is no Python any more, too
                is_array = False
            if not is_array:
                os.remove(path)
    except OSError as error:
        rule = f"has no folder for the indices: {folder} cannot be made ({error.strerror})"
        raise InputError("data.cache_path", None, rule, "set it to a folder that can be written") from error


@contextmanager
def _some_group(needed: bool) -> Iterator[None]:
    """Megatron's blended dataset asks for its rank even in a process without process groups: lend it a group of one."""
    if not needed or torch.distributed.is_initialized():
        yield
        return
    hook = sys.excepthook  # torch prefixes tracebacks with the rank, and does not undo it
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        sys.excepthook = hook
