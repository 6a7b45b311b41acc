"""The right to write a cache, and what there is to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minitron_mcore.checkpoint.folder_lock import FolderLock
from minitron_mcore.distillation.cache.file import LOCK, CacheReader, write_settings
from minitron_mcore.distillation.cache.serving import find_cache
from minitron_mcore.errors import InputError
from minitron_mcore.files import writing


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
