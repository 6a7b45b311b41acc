"""Which targets a folder holds, whether they serve a loss, and what is missing. Pure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_mcore.distillation.cache.file import DESCRIPTION, LOCK, CacheReader, has_tails, write_settings
from minitron_mcore.distillation.config import CACHE, DistillConfig
from minitron_mcore.errors import InputError
from minitron_mcore.files import writing
from minitron_mcore.keys import flat

if TYPE_CHECKING:
    from minitron_mcore.runtime.folder_lock import FolderLock

# Shards that lack samples, and which.
Missing = list[tuple[int, range]]

# Any other divergence of sampled targets would be biased.
DIVERGENCES = {"sampled": ("forward_kl",), "top_k": ("forward_kl", "reverse_kl", "jensen_shannon")}


def cache_folder(teacher: str | None) -> Path | None:
    """The folder that distill.teacher=cache:DIR names; None for a teacher in memory."""
    return None if teacher is None else Path(teacher.removeprefix(CACHE))


def holds_all(settings: dict[str, Any]) -> bool:
    """Whether the teacher's whole distribution is kept."""
    return settings["method"] == "top_k" and not has_tails(settings)


def check_served(settings: dict[str, Any], distill: DistillConfig, key: str) -> None:
    """Raise InputError where the losses of `distill` cannot be had from targets made by `settings`.

    key: what the recipe calls them, with its value.
    """
    there, here = settings["temperature"], distill.temperature
    if here != there and not holds_all(settings):
        rule = f"differs from the temperature {there} of the targets in {key}"
        remedy = f"make them equal, or cache with cache.temperature={here}"
        raise InputError("distill.temperature", here, rule, remedy)
    allowed = DIVERGENCES[settings["method"]]
    if distill.logit_loss not in allowed:
        rule = f"needs more of the teacher than {key} holds, which serves {' and '.join(allowed)}"
        remedy = "choose of these, or leave distill.teacher out"
        raise InputError("distill.logit_loss", distill.logit_loss, rule, remedy)
    if distill.top_k:
        rule = f"is for a teacher in memory: what {key} holds was chosen when it was made"
        raise InputError("distill.top_k", distill.top_k, rule, "set distill.top_k=0")
    if distill.correct_teacher:
        rule = f"trains the teacher, and {key} holds none"
        raise InputError("distill.correct_teacher", True, rule, "leave one of the two out")


def find_cache(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The settings of the cache in `folder`, None where there is none yet.

    Raises InputError where something else lies there, or another cache than one of `settings` with fewer samples. Where
    a teacher of the same weights lay does not count.
    """
    key = "cache.folder"
    if not (folder / DESCRIPTION).is_file():
        if folder.is_dir() and any(path.suffix != ".tmp" and path.name != LOCK for path in folder.iterdir()):
            raise InputError(key, folder, "holds other files", "name another folder")
        return None
    stored = CacheReader(folder).settings
    there, here = flat(stored), flat(settings)
    same_weights = here["teacher.weights"] is not None and here["teacher.weights"] == there.get("teacher.weights")
    for name in sorted({*there, *here} - {"num_samples"} - ({"teacher.checkpoint"} if same_weights else set())):
        if there.get(name) != here.get(name):
            rule = f"holds another cache: {name} is {there.get(name)!r} there and {here.get(name)!r} here"
            raise InputError(key, folder, rule, "name another folder, or delete that one")
    if there["num_samples"] > here["num_samples"]:
        rule = f"holds {there['num_samples']} samples, and cache.num_samples or distill.tokens asks for"
        remedy = "a cache may grow, not shrink: ask for as many, or name another folder"
        raise InputError(key, folder, f"{rule} {here['num_samples']}", remedy)
    return stored


def claim(folder: Path, settings: dict[str, Any], lock: FolderLock) -> Missing:
    """The shards that are to be written, once the folder's settings ask for them.

    The first rank calls; `lock` is taken where there is something to write. Raises InputError where another process
    writes there, and as `find_cache`.
    """
    there, wanted = find_cache(folder, settings), settings["num_samples"]
    if there and there["num_samples"] == wanted and not CacheReader(folder).missing_shards(wanted):
        return []
    with writing(str(folder)):
        lock.take()
        there = find_cache(folder, settings)
        if there is None or there["num_samples"] != wanted:
            write_settings(folder, {**(there or settings), "num_samples": wanted})
        if lock.is_sure:
            for unfinished in folder.glob("*.tmp"):
                unfinished.unlink()
    reader, size = CacheReader(folder), settings["shard_samples"]
    begun = ((shard, shard * size + reader.held(shard)) for shard in reader.missing_shards(wanted))
    return [(shard, range(first, min((shard + 1) * size, wanted))) for shard, first in begun]
