"""`cache`: the teacher's targets of the samples that `distill` will train on, written once, read at any layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

from minitron_mcore.checkpoint.folder_lock import FolderLock
from minitron_mcore.checkpoint.store import as_chunks, load_weights
from minitron_mcore.data.dataset import Dataset, batches_once, build_datasets
from minitron_mcore.distillation.cache.draw import Drawing
from minitron_mcore.distillation.cache.file import LOCK, CacheReader, token_checksum, write_settings
from minitron_mcore.distillation.cache.write import write_missing
from minitron_mcore.errors import InputError
from minitron_mcore.files import writing
from minitron_mcore.jobs.cache import CacheJob, find_cache
from minitron_mcore.model.gpt import build_model
from minitron_mcore.model.microbatch import Microbatch, to_device
from minitron_mcore.model.schedule import in_calls
from minitron_mcore.runtime.agree import all_or_none
from minitron_mcore.runtime.parallel import lay_out
from minitron_mcore.runtime.start import Runtime


def run(job: CacheJob, runtime: Runtime) -> Path:
    """Write what is missing of `job.folder` and return it; every rank calls."""
    recipe, cache, folder, tokenizer = job.recipe, job.recipe.cache, job.folder, job.tokenizer
    assert tokenizer is not None
    lay_out(recipe.parallel, recipe.seed, runtime.world_size)
    dataset, _, _ = build_datasets(
        recipe.data, tokenizer, train_samples=job.num_samples, valid_samples=0, seed=recipe.seed
    )
    assert dataset is not None
    there = runtime.on_main(lambda: find_cache(folder, job.settings))
    if there is not None and there["num_samples"] < job.num_samples:
        check_order(runtime, CacheReader(folder), dataset, job.num_samples)
    lock = cache_lock(folder)
    try:
        settings, missing = runtime.on_main(lambda: claim(folder, job.settings, lock))
        if not missing:
            runtime.print(f"cache: {folder} holds all {job.num_samples:,} samples")
            return folder
        chunks = build_model(job.teacher.architecture, recipe.parallel, job.precision, trainable=False)
        load_weights(*job.teacher.place, as_chunks(chunks), job.teacher.architecture)
        runtime.print(
            f"cache: {cache.method} targets of {job.teacher.folder}, {job.num_samples:,} samples of "
            f"{recipe.data.sequence_length:,} tokens, {len(missing)} shards to write -> {folder}"
        )
        drawing = Drawing(
            method=cache.method,
            vocab_size=settings["vocab_size"],
            temperature=settings["temperature"],
            draws=cache.draws,
            proposal_temperature=cache.proposal_temperature,
            top_k=settings.get("top_k", 0),
            seed=recipe.seed,
            chunk_tokens=cache.chunk_tokens,
        )

        def read(samples: list[int]) -> Iterator[list[Microbatch]]:
            stream = batches_once(
                dataset,
                samples,
                micro_batch_size=cache.micro_batch_size,
                data_parallel_rank=0,
                data_parallel_size=1,
                num_workers=recipe.data.num_workers,
            )
            return in_calls(map(to_device, stream), interleaved=len(chunks) > 1)

        write_missing(chunks, read, drawing, folder, settings, missing, runtime)
    finally:
        lock.release()
    return folder


def check_order(runtime: Runtime, reader: CacheReader, dataset: Dataset, num_samples: int) -> None:
    """Raise InputError where a sample that is there would have other tokens among `num_samples`. Every rank calls, and
    reads some of them."""
    count, size = reader.settings["num_samples"], reader.settings["shard_samples"]

    def check_mine() -> None:
        for shard in range(runtime.rank, -(-count // size), runtime.world_size):
            for sample in range(shard * size, shard * size + reader.held(shard)):
                if token_checksum(numpy.asarray(dataset[sample]["tokens"])) != reader.tokens_of(sample):
                    raise InputError(
                        "cache.folder",
                        reader.folder,
                        f"cannot grow from {count} samples to {num_samples}: sample {sample} would have other tokens, "
                        "since the order depends on the number of passes through the text",
                        "ask for no more passes than it was made with, or name another folder",
                    )

    all_or_none(check_mine)


def cache_lock(folder: Path) -> FolderLock:
    """The right to write the cache in `folder`, not yet taken."""
    rule, remedy = "is being written by another `cache`", "wait for it, or name another folder"
    return FolderLock(folder / LOCK, InputError("cache.folder", folder, rule, remedy))


def claim(folder: Path, settings: dict[str, Any], lock: FolderLock) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """(the settings in the folder from now on, the shards that are to be written and how many samples each holds).

    The first rank calls; `lock` is taken where there is something to write. Raises InputError where another process
    writes there, and as `find_cache`.
    """
    there = find_cache(folder, settings)
    if there is not None and there["num_samples"] == settings["num_samples"]:
        reader = CacheReader(folder)
        if not reader.missing_shards(settings["num_samples"]):
            return there, []
    with writing(str(folder)):
        lock.take()
        there = find_cache(folder, settings)
        settings = {**(there or settings), "num_samples": settings["num_samples"]}
        if settings != there:
            write_settings(folder, settings)
        if lock.is_sure:
            for partial in folder.glob("*.tmp"):
                partial.unlink()
    reader = CacheReader(folder)
    return settings, [(shard, reader.held(shard)) for shard in reader.missing_shards(settings["num_samples"])]
