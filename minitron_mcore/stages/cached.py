"""What `distill` refuses of a cache in the teacher's place, before a model is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import find_checkpoint, read_architecture, read_lineage
from minitron_mcore.data.dataset import build_datasets
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.distillation.cache.file import DESCRIPTION, require_settings, settings_digest
from minitron_mcore.distillation.cache.teacher import CachedTeacher, check_cached
from minitron_mcore.errors import InputError
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages.cache import describe_data, identity, samples_needed
from minitron_mcore.stages.score import flat


def open_cache(
    recipe: Recipe, runtime: Runtime, folder: Path, tokenizer: Tokenizer, architecture: Architecture
) -> CachedTeacher:
    """The teacher of distill.teacher=cache:`folder`, for a student of `architecture`. Every rank calls.

    Raises InputError where it was made for another tokenizer, vocabulary, data, order or teacher, where it cannot serve
    the loss, where it is not whole, and where the run that is gone on with has had other targets so far.
    """
    teacher = CachedTeacher(folder, recipe.distill.temperature)
    settings, key = teacher.reader.settings, f"distill.teacher={recipe.distill.teacher}"
    require_settings(folder / DESCRIPTION, settings, ("tokenizer",))
    require_settings(folder / DESCRIPTION, settings["teacher"], ("checkpoint", "iteration", "weights"))
    check_cached(teacher, recipe.distill)
    if settings["vocab_size"] != architecture.vocab_size:
        raise InputError(
            f"{key} is of a teacher with vocab_size={settings['vocab_size']}, and the student has "
            f"{architecture.vocab_size}: a student is distilled from a teacher of the same vocabulary"
        )
    if not tokenizer.is_named_by(settings["tokenizer"]):
        raise InputError(
            f"{key} was made with another tokenizer ({settings['tokenizer'][:12]}) than the student's "
            f"({tokenizer.path}, {tokenizer.fingerprint[:12]}): make it anew from the student's data "
            "(allow=[other_tokenizer] takes its ids as they are)"
        )
    check_teacher(recipe, settings, key)
    if recipe.distill.checkpoint:
        refuse_other_targets(Path(recipe.distill.checkpoint), teacher, key)
    there, here = flat(settings), flat(runtime.on_main(lambda: describe_data(recipe, tokenizer)))
    for name, value in here.items():
        if there.get(name) != value:
            raise InputError(
                f"{key} was made from other data: {name} is {there.get(name)!r} there and {value!r} here; give the "
                "data it was made from, or make it anew"
            )
    needed = samples_needed(recipe)
    if settings["num_samples"] < needed:
        raise InputError(
            f"{key} holds the first {settings['num_samples']:,} samples, and distill.tokens={recipe.distill.tokens} "
            f"takes {needed:,}: run `cache` again for as many, which adds what is missing, or lower distill.tokens"
        )
    count = settings["num_samples"]
    dataset, _, _ = build_datasets(recipe.data, tokenizer, train_samples=count, valid_samples=0, seed=recipe.seed)
    runtime.on_main(lambda: check_files(teacher, dataset, needed, key))
    return teacher


def check_teacher(recipe: Recipe, settings: dict[str, Any], key: str) -> None:
    """Raise InputError where the recipe names another teacher than the one that was asked; it need not be there."""
    named = recipe.teacher.checkpoint
    if not named or not Path(named).is_dir():
        return
    folder, iteration = find_checkpoint(named, "teacher.checkpoint")
    there, here = settings["teacher"], identity(folder, iteration)
    same = all(there[name] == here[name] for name in here)
    if here["weights"] is None:
        # Nothing says what is in the files but where they lie.
        same = same and Path(there["checkpoint"]).resolve() == folder.resolve()
    if not same or there["architecture"] != json.loads(json.dumps(read_architecture(folder).to_dict())):
        raise InputError(
            f"{key} was made by another teacher ({there['checkpoint']}, iteration {there['iteration']}) than "
            f"teacher.checkpoint={named}, iteration {here['iteration']}: make it anew, or leave teacher.checkpoint out"
        )


def check_files(teacher: CachedTeacher, dataset: Any, needed: int, key: str) -> None:
    """Raise InputError where shards are missing or cut off, or samples have other tokens. The first rank calls."""
    missing = teacher.reader.missing_shards(needed)
    if missing:
        raise InputError(
            f"{key} is not finished: {len(missing)} of its shards are missing, the first is {missing[0]}; run `cache` "
            "again, which writes what is missing"
        )
    teacher.check_dataset(dataset, needed)


def lineage_of(teacher: CachedTeacher) -> dict[str, Any]:
    """Who was asked, and how, for the student's lineage.yaml."""
    settings = teacher.reader.settings
    asked = {name: value for name, value in settings["teacher"].items() if name != "architecture"}
    how = ("method", "draws", "proposal_temperature", "top_k", "temperature", "dtype", "precision", "num_samples")
    said = {name: settings[name] for name in how if name in settings}
    return {**asked, **said, "targets": settings_digest(settings)}


def refuse_other_targets(folder: Path, teacher: CachedTeacher, key: str) -> None:
    """Raise InputError where the run in `folder` was distilled from targets that were made in another way.

    Where they lay, and how many there are, may have changed. Any rank calls.
    """
    lineage = read_lineage(folder)
    before, now = lineage.get("teacher", {}), lineage_of(teacher)
    if lineage.get("stage") != "distill" or "targets" not in before or before["targets"] == now["targets"]:
        return
    moved = {"num_samples", "targets"} | ({"checkpoint"} if now["weights"] is not None else set())
    other = [name for name in now if name not in moved and before.get(name) != now[name]]
    words = (
        f"{other[0]} is {before.get(other[0])!r} there and {now[other[0]]!r} in {key}"
        if other
        else (f"{key} was made from other data, or by another model, than then")
    )
    raise InputError(
        f"distill.checkpoint={folder} was distilled from other targets so far: {words}; name the cache it began with, "
        "or another distill.checkpoint"
    )
