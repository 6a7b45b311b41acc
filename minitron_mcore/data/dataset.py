"""Datasets of fixed-length samples from token files, and the microbatches that training reads from them.

Legend: b micro batch size, s sequence length.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional, Protocol

import numpy
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from minitron_mcore.data.blend import (
    Blend,
    Bounds,
    Facts,
    Part,
    inspect_parts,
    parse_blend,
    parse_split,
    source_names,
    surplus,
)
from minitron_mcore.data.config import DataConfig
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.runtime.agree import all_or_none, broadcast, is_main
from minitron_mcore.runtime.interrupt import held_back, outlive_signals

Batch = dict[str, torch.Tensor]

FIELDS = ("tokens", "labels", "loss_mask", "position_ids")
SPLITS = ("train", "valid", "test")
WHOLE = (0.0, 1.0)


class Dataset(Protocol):
    """Samples by number, each with FIELDS as tensors [s]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def build_datasets(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    train_samples: Optional[int],
    valid_samples: Optional[int],
    test_samples: Optional[int] = 0,
    seed: int,
    is_built_on_rank: Callable[[], bool] = lambda: True,
) -> tuple[Optional[Dataset], Optional[Dataset], Optional[Dataset]]:
    """(train, valid, test): Megatron's GPT datasets over the blends of `data`.

    Each holds at least the samples asked for, going through its text as often as that takes; None asks for every sample
    of one pass (a blend's weights then do not count), and 0 gives None. Documents and samples are shuffled by `seed`;
    the order also depends on the number of passes. Validation is `data.valid`, or where that is null a part of
    `data.train` by `data.split`, as test always is.

    Every rank calls it, with process groups or without. The first rank writes the index cache, and must be among those
    where `is_built_on_rank`; elsewhere the datasets are None. Raises InputError, on every rank if on one.
    """
    sizes = (train_samples, valid_samples, test_samples)
    parts = [
        Part(name, blend, _given(share, data, name), size)
        for name, (blend, share), size in zip(SPLITS, _blends(data), sizes, strict=True)
        if size != 0
    ]
    built = _build(data, tokenizer, parts, seed, is_built_on_rank)
    by_name = {part.name: dataset for part, dataset in zip(parts, built, strict=True)}
    return by_name.get("train"), by_name.get("valid"), by_name.get("test")


def build_training_datasets(
    data: DataConfig, tokenizer: Tokenizer, *, train_samples: dict[int, int], valid_samples: int, seed: int
) -> tuple[dict[int, Dataset], dict[str, Dataset]]:
    """What a training reads: its sets by their sequence lengths, and those of validation by their names.

    train_samples: samples needed of each sequence length. Validation is of `data.sequence_length`; "" is what
    `build_datasets` gives, and where that blends several sources, each of them is there alone too, as if `data` named
    no other. Without `valid_samples` there is none, nor where nobody asked for held-out text (`data.valid` is null and
    `data.split` as it is by default, or with no share for it) and what `data.split` holds out is less than one sample.
    Called like `build_datasets`, on every rank. Raises InputError.
    """
    (train, share), (valid, valid_share), _ = _blends(data)
    parts = [
        Part("train", train, _given(share, data, "train"), size, sequence_length=length)
        for length, size in train_samples.items()
    ]
    names: list[str] = []
    if valid_samples and valid_share is not None:
        is_asked_for = data.valid is not None or data.split != DataConfig.split
        prefixes = list(dict.fromkeys(valid.prefixes))
        sources = {"": valid}
        if len(prefixes) > 1:
            alone = [Blend((prefix,), None, valid.key) for prefix in prefixes]
            sources |= dict(zip(source_names(prefixes), alone, strict=True))
        parts += [
            Part("valid", blend, valid_share, valid_samples, is_asked_for=is_asked_for) for blend in sources.values()
        ]
        names = list(sources)
    built: list[Any] = _build(data, tokenizer, parts, seed, lambda: True)
    count = len(train_samples)
    validation = {name: dataset for name, dataset in zip(names, built[count:], strict=True) if dataset is not None}
    return dict(zip(train_samples, built[:count], strict=True)), validation


def _blends(data: DataConfig) -> list[tuple[Blend, Optional[Bounds]]]:
    """(blend, its documents' share, None where that is empty) of train, valid and test."""
    train = parse_blend(data.train, "data.train")
    shares = parse_split(data.split) if data.valid is None else [WHOLE, WHOLE, None]
    blends = [train, train if data.valid is None else parse_blend(data.valid, "data.valid"), train]
    return list(zip(blends, shares, strict=True))


def _given(share: Optional[Bounds], data: DataConfig, name: str) -> Bounds:
    if share is None:
        raise InputError(f"data.split={data.split} with data.valid={data.valid} leaves no documents for {name}")
    return share


def build_calibration_dataset(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    num_samples: int,
    seed: int,
    is_built_on_rank: Callable[[], bool] = lambda: True,
) -> Optional[Dataset]:
    """What calibration draws from: `data.calibration`, or the training documents where that is null.

    Its samples are all different, and do not depend on how long training runs. A weighted blend gives about
    `num_samples` in proportion; anything else gives one whole pass. Called like `build_datasets`. Raises InputError.
    """
    if num_samples < 1:
        raise InputError(f"importance.num_samples={num_samples} calibration samples are too few; ask for 1 or more")
    if data.calibration is not None:
        blend, share = parse_blend(data.calibration, "data.calibration"), WHOLE
    else:
        blend = parse_blend(data.train, "data.train")
        cut = parse_split(data.split)[0] if data.valid is None else WHOLE
        if cut is None:
            raise InputError(f"data.split={data.split} leaves no documents for training; set data.calibration")
        share = cut
    part = Part("train", blend, share, num_samples if blend.weights else None, one_pass=True)
    return _build(data, tokenizer, [part], seed, is_built_on_rank)[0]


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
    and `samples` int64 [b], the samples' numbers in the dataset.

    Megatron's order. A global batch is the next `global_batch_size` samples whatever the layout; its k-th microbatch
    on rank r is the b samples from (k * data_parallel_size + r) * b on. After the last sample the first one follows.
    Restarting with the samples consumed so far gives the same batches. On the CPU (pinned for CUDA). Raises InputError.
    """
    if micro_batch_size < 1 or global_batch_size < 1 or global_batch_size % (micro_batch_size * data_parallel_size):
        raise InputError(
            f"global_batch_size={global_batch_size} must be a multiple of micro_batch_size={micro_batch_size} times "
            f"the data-parallel size {data_parallel_size}"
        )
    stride = micro_batch_size * data_parallel_size
    order = _Endless(len(dataset), consumed_samples + data_parallel_rank * micro_batch_size, micro_batch_size, stride)
    return _read(_Numbered(dataset), order, num_workers)


def num_rounds(num_samples: int, *, micro_batch_size: int, data_parallel_size: int) -> int:
    """Microbatches that each rank runs in `batches_once`."""
    return -(-num_samples // (micro_batch_size * data_parallel_size))


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

    Every rank gets `num_rounds` microbatches of full size; where the samples run out, fillers take their place, with
    `loss_mask` all 0. Beside the fields of `batches`, `valid` fp32 [b] is 1 for a sample and 0 for a filler.
    """
    rounds = num_rounds(len(samples), micro_batch_size=micro_batch_size, data_parallel_size=data_parallel_size)
    stride = micro_batch_size * data_parallel_size
    starts = [k * stride + data_parallel_rank * micro_batch_size for k in range(rounds)]
    order = [list(range(start, start + micro_batch_size)) for start in starts]
    return _read(_Filled(dataset, samples), order, num_workers)


class _Endless:
    """Lists of `width` consecutive sample numbers, `stride` apart, modulo the dataset's length."""

    def __init__(self, length: int, start: int, width: int, stride: int) -> None:
        self.length, self.start, self.width, self.stride = length, start, width, stride

    def __iter__(self) -> Iterator[list[int]]:
        start = self.start
        while True:
            yield [(start + i) % self.length for i in range(self.width)]
            start += self.stride


class _Numbered:
    """A dataset whose samples tell their own number, as `samples`."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], "samples": torch.tensor(index)}


class _Filled:
    """The chosen samples of a dataset, and fillers at every position beyond."""

    def __init__(self, dataset: Dataset, samples: Sequence[int]) -> None:
        self.dataset, self.samples = dataset, samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> dict[str, Any]:
        is_sample = position < len(self.samples)
        number = self.samples[position if is_sample else 0]
        sample = {**self.dataset[number], "samples": torch.tensor(number)}
        if not is_sample:
            sample["loss_mask"] = torch.zeros_like(sample["loss_mask"])
        sample["valid"] = torch.tensor(float(is_sample))
        return sample


def _read(dataset: Dataset, order: Any, num_workers: int) -> Iterator[Batch]:
    loader: torch.utils.data.DataLoader = torch.utils.data.DataLoader(
        dataset,  # type: ignore[arg-type]  # a dataset by its methods
        batch_sampler=order,
        collate_fn=_collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=outlive_signals,
    )
    with held_back():  # a Ctrl-C that met a reader just forked would be told to this process as a second one
        return iter(loader)


def _collate(samples: list[dict[str, Any]]) -> Batch:
    fields = (*FIELDS, "samples", *(("valid",) if "valid" in samples[0] else ()))
    return {name: torch.stack([sample[name] for sample in samples]) for name in fields}


def _build(
    data: DataConfig, tokenizer: Tokenizer, parts: list[Part], seed: int, is_built_on_rank: Callable[[], bool]
) -> list[Optional[Dataset]]:
    """One dataset for each part, in order."""
    if not parts:
        return []
    folder = data.cache_path or os.path.join(os.path.dirname(parts[0].blend.prefixes[0]), "cache")

    def check() -> Optional[Facts]:
        facts = inspect_parts(parts, tokenizer, sequence_length=data.sequence_length, thorough=is_main())
        if facts:
            _prepare_cache(os.path.join(folder, facts.digest[:16]))
        return facts

    facts = broadcast(all_or_none(check))
    assert facts is not None
    # Megatron keys its cache by the files' names; the digest keeps the indices of overwritten files apart.
    cache = os.path.join(folder, facts.digest[:16])
    return [
        None if tokens is None else _build_part(data, tokenizer, part, tokens, seed, cache, is_built_on_rank)
        for part, tokens in zip(parts, facts.tokens, strict=True)
    ]


def _build_part(
    data: DataConfig,
    tokenizer: Tokenizer,
    part: Part,
    tokens: tuple[int, ...],
    seed: int,
    cache: str,
    is_built_on_rank: Callable[[], bool],
) -> Optional[Dataset]:
    weights: Optional[list[float]] = None
    if part.size is not None and len(part.blend.prefixes) > 1:
        # Without weights Megatron stops after one pass; token counts as weights mix alike and go on.
        weights = [float(weight) for weight in part.blend.weights or tokens]
    config = GPTDatasetConfig(
        random_seed=seed % 2**32,
        sequence_length=part.sequence_length or data.sequence_length,
        blend=(list(part.blend.prefixes), weights),
        split="1",
        path_to_cache=cache,
        tokenizer=tokenizer,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=False,
        eod_mask_loss=data.eod_mask_loss,
        create_attention_mask=False,
        mid_level_dataset_surplus=surplus(part.blend, part.size or 0),
    )
    split = SPLITS.index(part.name)
    # One part at a time, so that a part nobody asked for need not have documents.
    config.split_matrix = [part.share if i == split else None for i in range(len(SPLITS))]
    sizes = [part.size if i == split else 0 for i in range(len(SPLITS))]
    with _some_group(needed=len(part.blend.prefixes) > 1):
        return BlendedMegatronDatasetBuilder(GPTDataset, sizes, is_built_on_rank, config).build()[split]


def _prepare_cache(folder: str) -> None:
    """Make the cache folder, and drop indices that a killed run left half-written: Megatron would trust them."""
    try:
        os.makedirs(folder, exist_ok=True)
        for path in glob.glob(os.path.join(glob.escape(folder), "*.npy")):
            try:
                numpy.load(path, mmap_mode="r")
            except (ValueError, EOFError):
                os.remove(path)
    except OSError as error:
        raise InputError(f"the index cache {folder} cannot be made: {error.strerror}; set data.cache_path") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"the index cache {folder} cannot be written; set data.cache_path to a folder that can")


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
