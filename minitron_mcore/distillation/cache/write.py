"""The right to write a cache; a teacher asked for its targets, shard after shard."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch

from minitron_mcore.data.dataset import Dataset
from minitron_mcore.distillation.cache.draw import make_targets
from minitron_mcore.distillation.cache.file import LOCK, CacheReader, encode_targets, token_checksum, write_shard
from minitron_mcore.distillation.cache.serving import Missing
from minitron_mcore.errors import InputError
from minitron_mcore.model.gpt import LanguageModel
from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.model.schedule import visit_final_states
from minitron_mcore.runtime.agree import all_or_none
from minitron_mcore.runtime.folder_lock import FolderLock
from minitron_mcore.runtime.groups import data_group, on_last_stage, tensor_group
from minitron_mcore.runtime.interrupt import made_progress
from minitron_mcore.runtime.pace import Pace
from minitron_mcore.runtime.start import Runtime

# Sample numbers -> their microbatches, for one call of the schedule after another.
Reader = Callable[[list[int]], Iterable[list[Microbatch]]]


def cache_lock(folder: Path) -> FolderLock:
    """The right to write the cache in `folder`, not yet taken."""
    rule, remedy = "is being written by another `cache`", "wait for it, or name another folder"
    return FolderLock(folder / LOCK, InputError("cache.folder", folder, rule, remedy))


def write_missing(
    chunks: list[LanguageModel], read: Reader, chunk_tokens: int, folder: Path, missing: Missing, runtime: Runtime
) -> None:
    """Shard after shard, each by one data-parallel replica; the replicas meet after each. Every rank calls.

    missing: of the cache in `folder`; what is in them already stays as it is. An error that is no InputError is this
    rank's alone, as the others wait for it.
    """
    reader = CacheReader(folder)
    settings = reader.settings
    replica, replicas = data_group().rank(), data_group().size()
    pace, written = Pace(), torch.zeros(2, dtype=torch.float64, device=runtime.device)

    def write(mine: Missing) -> None:
        for shard, samples in mine:
            blocks = ask_teacher(chunks, read, list(samples), chunk_tokens, settings)
            if on_last_stage() and tensor_group().rank() == 0:
                held = samples.start - shard * settings["shard_samples"]
                write_shard(folder, settings, shard, [*reader.stored(shard, held), *blocks])
                sizes = [len(samples), sum(len(block) for block, _ in blocks)]
                written.add_(torch.tensor(sizes, device=written.device))

    length = settings["data.sequence_length"]
    with runtime.progress(sum(len(samples) for _, samples in missing) * length, "tokens", "cache") as bar:
        for turn in range(0, len(missing), replicas):
            all_or_none(partial(write, missing[turn + replica : turn + replica + 1]), InputError)
            made_progress()
            bar.advance(sum(len(samples) for _, samples in missing[turn : turn + replicas]) * length)
    torch.distributed.all_reduce(written)
    runtime.print(
        f"cache: {len(missing)} shards, {pace.rate(bar.done):,.0f} tokens/s, "
        f"{written[1].item() / bar.done:.2f} bytes a token"
    )


def ask_teacher(
    chunks: list[LanguageModel], read: Reader, samples: list[int], chunk_tokens: int, settings: dict[str, Any]
) -> list[tuple[bytes, str]]:
    """(block, checksum of its tokens) of each of `samples`, on the first tensor-parallel rank of the last stage.

    Every rank of a replica calls, with the same samples. Raises InputError where logits are NaN or Inf.
    """
    group = tensor_group()
    blocks: dict[int, tuple[bytes, str]] = {}
    bad: list[int] = []

    def visit(chunk: LanguageModel, hidden_SBH: torch.Tensor, microbatch: Microbatch) -> None:
        assert microbatch.valid is not None and microbatch.samples is not None
        real = microbatch.valid.bool()
        numbers = microbatch.samples[real]
        if not len(numbers):
            return
        how: Any = {"sequence_parallel": chunk.config.sequence_parallel, "chunk_tokens": chunk_tokens}
        given = hidden_SBH[:, real], chunk.head_weight(), numbers, settings
        targets, finite = make_targets(*given, tp_group=group, **how)
        bad.extend(numbers[~finite].tolist())
        if group.rank() > 0:
            return
        tokens = microbatch.tokens[real].cpu().numpy()
        for number, tokens_S, of_sample in zip(numbers.tolist(), tokens, targets, strict=True):
            blocks[number] = encode_targets(of_sample, settings), token_checksum(tokens_S)

    for part in read(samples):
        visit_final_states(chunks, part, visit)
    if bad:
        rule = f"gives logits that are NaN or Inf in sample {min(bad)} of the training data"
        checkpoint = settings["teacher"]["checkpoint"]
        raise InputError("teacher.checkpoint", checkpoint, rule, "check its weights and the precision")
    return [blocks[number] for number in samples if number in blocks]


def check_order(runtime: Runtime, reader: CacheReader, dataset: Dataset, num_samples: int) -> None:
    """Raise InputError where a sample that is there would have other tokens among `num_samples`. Every rank calls, and
    reads some of them."""
    count, size = reader.settings["num_samples"], reader.settings["shard_samples"]

    def check_mine() -> None:
        for shard in range(runtime.rank, -(-count // size), runtime.world_size):
            for sample in range(shard * size, shard * size + reader.held(shard)):
                if token_checksum(numpy.asarray(dataset[sample]["tokens"])) != reader.tokens_of(sample):
                    rule = f"cannot grow from {count} samples to {num_samples}: sample {sample} would have other tokens"
                    why = "since the order depends on the number of passes through the text"
                    remedy = "ask for no more passes than it was made with, or name another folder"
                    raise InputError("cache.folder", reader.folder, f"{rule}, {why}", remedy)

    all_or_none(check_mine)
