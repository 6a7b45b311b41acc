"""Whether a cache of teacher targets serves a distillation. Pure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import find_checkpoint, read_architecture, read_lineage
from minitron_mcore.checkpoint.identity import identity
from minitron_mcore.data.described import describe, split_part
from minitron_mcore.data.index import digest_of
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.distillation.cache.file import DESCRIPTION, CacheReader, require_settings, settings_digest
from minitron_mcore.distillation.cache.serving import check_served
from minitron_mcore.errors import InputError
from minitron_mcore.keys import flat
from minitron_mcore.recipe import Recipe
from minitron_mcore.training.budget import plan_timetable

KEY = "distill.teacher"


def check_cache_serves(
    recipe: Recipe, folder: Path, tokenizer: Tokenizer | None, architecture: Architecture
) -> dict[str, Any]:
    """The settings of distill.teacher=cache:`folder`, for a student of `architecture`.

    Raises InputError where it was made for another tokenizer, vocabulary, data, order or teacher, where it cannot serve
    the loss, where it is not whole, and where the run that is gone on with has had other targets so far.
    """
    reader = CacheReader(folder)
    settings, given = reader.settings, recipe.distill.teacher
    require_settings(folder / DESCRIPTION, settings, ("tokenizer",))
    require_settings(folder / DESCRIPTION, settings["teacher"], ("checkpoint", "iteration", "weights"))
    check_served(settings, recipe.distill, f"{KEY}={given}")
    if settings["vocab_size"] != architecture.vocab_size:
        rule = (
            f"is of a teacher with vocab_size={settings['vocab_size']}, and the student has {architecture.vocab_size}"
        )
        raise InputError(KEY, given, rule, "a student is distilled from a teacher of the same vocabulary")
    check_teacher(recipe, settings)
    if recipe.distill.checkpoint:
        refuse_other_targets(Path(recipe.distill.checkpoint), settings, f"{KEY}={given}")
    if tokenizer is not None:
        check_text(recipe, settings, tokenizer)
    needed = samples_needed(recipe)
    if settings["num_samples"] < needed:
        rule = (
            f"holds the first {settings['num_samples']:,} samples, and distill.tokens={recipe.distill.tokens} takes "
            f"{needed:,}"
        )
        remedy = "run `cache` again for as many, which adds what is missing, or lower distill.tokens"
        raise InputError(KEY, given, rule, remedy)
    if missing := reader.missing_shards(needed):
        rule = f"is not finished: {len(missing)} of its shards are missing, the first is {missing[0]}"
        raise InputError(KEY, given, rule, "run `cache` again, which writes what is missing")
    return settings


def check_text(recipe: Recipe, settings: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Raise InputError where the targets are of other tokens than the recipe's data, tokenizer and seed give."""
    given = recipe.distill.teacher
    if not tokenizer.is_named_by(settings["tokenizer"]):
        raise InputError(
            KEY,
            given,
            f"was made with another tokenizer ({settings['tokenizer'][:12]}) than the student's ({tokenizer.path}, "
            f"{tokenizer.fingerprint[:12]})",
            "make it anew from the student's data (allow=[other_tokenizer] takes its ids as they are)",
        )
    there, here = flat(settings), flat(describe_data(recipe, tokenizer))
    for name, value in here.items():
        if there.get(name) != value:
            rule = f"was made from other data: {name} is {there.get(name)!r} there and {value!r} here"
            raise InputError(KEY, given, rule, "give the data it was made from, or make it anew")


def check_teacher(recipe: Recipe, settings: dict[str, Any]) -> None:
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
            KEY,
            recipe.distill.teacher,
            f"was made by another teacher ({there['checkpoint']}, iteration {there['iteration']}) than "
            f"teacher.checkpoint={named}, iteration {here['iteration']}",
            "make it anew, or leave teacher.checkpoint out",
        )


def samples_needed(recipe: Recipe) -> int:
    """Samples that `distill.tokens` takes. Raises InputError where they are not all of one length."""
    timetable = plan_timetable(recipe.distill, recipe.data.sequence_length, "distill")
    needed, length = timetable.samples_needed(), recipe.data.sequence_length
    if list(needed) != [length]:
        rule = f"have the sequence lengths {sorted(needed)}, but a cache holds samples of data.sequence_length={length}"
        raise InputError("distill.phases", None, rule, "give every phase that length")
    return needed[length]


def describe_data(recipe: Recipe, tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides which tokens a sample has, beside the number of samples. Raises InputError."""
    part = split_part(recipe.data, "train", None)
    digest = digest_of(describe(recipe.data, [part], tokenizer).sources)
    described = {
        "data.train": {"digest": digest, "weights": part.blend.weights},
        "data.split": part.share,
        "data.sequence_length": recipe.data.sequence_length,
        "seed": recipe.seed,
    }
    return json.loads(json.dumps(described))


def lineage_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Who was asked, and how, for the student's lineage.yaml."""
    asked = {name: value for name, value in settings["teacher"].items() if name != "architecture"}
    how = ("method", "draws", "proposal_temperature", "top_k", "temperature", "dtype", "precision", "num_samples")
    said = {name: settings[name] for name in how if name in settings}
    return {**asked, **said, "targets": settings_digest(settings)}


def refuse_other_targets(folder: Path, settings: dict[str, Any], key: str) -> None:
    """Raise InputError where the run in `folder` was distilled from targets that were made in another way.

    Where they lay, and how many there are, may have changed.
    """
    lineage = read_lineage(folder)
    before, now = lineage.get("teacher", {}), lineage_of(settings)
    if lineage.get("stage") != "distill" or "targets" not in before or before["targets"] == now["targets"]:
        return
    moved = {"num_samples", "targets"} | ({"checkpoint"} if now["weights"] is not None else set())
    other = [name for name in now if name not in moved and before.get(name) != now[name]]
    words = f"{key} was made from other data, or by another model, than then"
    if other:
        words = f"{other[0]} is {before.get(other[0])!r} there and {now[other[0]]!r} in {key}"
    remedy = "name the cache it began with, or another distill.checkpoint"
    raise InputError("distill.checkpoint", folder, f"was distilled from other targets so far: {words}", remedy)
