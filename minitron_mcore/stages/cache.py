"""`cache`: the teacher's targets of the samples that `distill` will train on, written once, read at any layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from minitron_mcore.checkpoint.store import load_model
from minitron_mcore.data.dataset import batches_once, build_datasets
from minitron_mcore.data.described import split_part
from minitron_mcore.distillation.cache.file import CacheReader
from minitron_mcore.distillation.cache.serving import claim, find_cache
from minitron_mcore.distillation.cache.write import cache_lock, check_order, write_missing
from minitron_mcore.jobs.cache import CacheJob
from minitron_mcore.model.microbatch import Microbatch, to_device
from minitron_mcore.model.schedule import in_calls
from minitron_mcore.runtime.parallel import lay_out
from minitron_mcore.runtime.start import Runtime


def run(job: CacheJob, runtime: Runtime) -> Path:
    """Write what is missing of `job.target` and return it; every rank calls."""
    recipe, cache, folder = job.recipe, job.recipe.cache, job.target
    lay_out(recipe.parallel, recipe.seed, runtime.world_size)
    part = split_part(recipe.data, "train", job.samples)
    (dataset,) = build_datasets(recipe.data, job.model.tokenizer, [part], seed=recipe.seed)
    assert dataset is not None
    there = runtime.on_main(lambda: find_cache(folder, job.settings))
    if there is not None and there["num_samples"] < job.samples:
        check_order(runtime, CacheReader(folder), dataset, job.samples)
    lock = cache_lock(folder)
    try:
        missing = runtime.on_main(lambda: claim(folder, job.settings, lock))
        if not missing:
            runtime.print(f"cache: {folder} holds all {job.samples:,} samples")
            return folder
        chunks = load_model(job.model.place, job.model.architecture, recipe.parallel, job.settings["precision"])
        runtime.print(
            f"cache: {cache.method} targets of {job.model.folder}, {job.samples:,} samples of "
            f"{recipe.data.sequence_length:,} tokens, {len(missing)} shards to write -> {folder}"
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

        write_missing(chunks, read, cache.chunk_tokens, folder, missing, runtime)
    finally:
        lock.release()
    return folder
