"""`cache`: the teacher's targets of the samples that `distill` will train on. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import find_checkpoint, identify_weights, read_architecture, read_lineage
from minitron_mcore.data.described import describe, describe_training, split_part
from minitron_mcore.data.index import Wanted, digest_of
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.distillation.cache.file import DESCRIPTION, CacheReader, require_settings, settings_digest
from minitron_mcore.distillation.cache.serving import check_served, find_cache
from minitron_mcore.distillation.config import CACHE, CacheConfig
from minitron_mcore.errors import InputError
from minitron_mcore.jobs.inputs import TEXT, budget_and_text, data_items, find_reader, output_folder, require
from minitron_mcore.jobs.job import NOTHING, Item, Model, ModelJob, Promises
from minitron_mcore.keys import flat
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.world import World
from minitron_mcore.training.budget import plan_timetable

KEY = "distill.teacher"


@dataclass(frozen=True, kw_only=True)
class CacheJob(ModelJob):
    """The targets of the teacher for so many `samples` into the folder `target`.

    settings: how they are made, as cache.json keeps it.
    """

    samples: int
    settings: dict[str, Any]


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING) -> CacheJob:
    """What is missing of `cache.folder`; the same command goes on where it was cut off, and one that asks for more
    samples adds them. Raises InputError."""
    needed = {"cache.folder": "the folder to write to", "teacher.checkpoint": "the folder of a checkpoint"}
    require(recipe, needed, TEXT if recipe.cache.num_samples else budget_and_text("distill"))
    cache, folder = recipe.cache, output_folder(recipe.cache.folder, "cache.folder")
    teacher = find_reader(recipe, world, promises, "teacher.checkpoint", whole="cache")
    check_top_k(cache, teacher.architecture)
    num_samples = cache.num_samples or samples_needed(recipe)
    asked = ("cache.num_samples", num_samples) if cache.num_samples else ("distill.tokens", recipe.distill.tokens)
    wanted = [Wanted(num_samples, recipe.data.sequence_length, *asked)]
    described = describe_training(recipe.data, teacher.tokenizer, wanted, promises.prefixes)
    settings: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    if teacher.iteration is not None and teacher.tokenizer is not None and not promises.prefixes:
        settings = settings_of(recipe, teacher, teacher.tokenizer, num_samples)
        find_cache(folder, settings)
        try:
            check_served(settings, recipe.distill, f"{KEY}={CACHE}{folder}")
        except InputError as error:
            notes = (f"`distill` will refuse what `cache` writes by this recipe: {error}",)
    reads: tuple[Model | Item, ...] = (teacher, *data_items(described))
    makes = (Item("cache.folder", str(folder), f"targets of {num_samples:,} samples"),)
    return CacheJob(recipe, reads, makes, notes, model=teacher, target=folder, samples=num_samples, settings=settings)


def check_top_k(cache: CacheConfig, architecture: Architecture) -> None:
    """Raise InputError where the teacher has fewer tokens than are to be kept."""
    if cache.method == "top_k" and cache.top_k > architecture.vocab_size:
        rule = f"is more than the teacher's vocab_size={architecture.vocab_size}"
        raise InputError("cache.top_k", cache.top_k, rule, "lower it, or set 0 to keep all")


def targets_of(recipe: Recipe, vocab_size: int) -> dict[str, Any]:
    """How targets follow from logits."""
    cache = recipe.cache
    drawn = {"draws": cache.draws, "proposal_temperature": cache.proposal_temperature}
    return {
        "method": cache.method,
        "temperature": recipe.distill.temperature if cache.temperature is None else cache.temperature,
        "vocab_size": vocab_size,
        **(drawn if cache.method == "sampled" else {"top_k": cache.top_k or vocab_size}),
    }


def check_promised(recipe: Recipe, vocab_size: int) -> int:
    """How many samples an earlier job of the same recipe will have asked for. Raises InputError where its targets could
    not serve the loss."""
    check_served(targets_of(recipe, vocab_size), recipe.distill, f"{KEY}={recipe.distill.teacher}")
    return recipe.cache.num_samples or samples_needed(recipe)


def settings_of(recipe: Recipe, teacher: Model, tokenizer: Tokenizer, num_samples: int) -> dict[str, Any]:
    """Everything that decides what the targets are, and which samples they are of."""
    cache, (folder, iteration), vocab_size = recipe.cache, teacher.place, teacher.architecture.vocab_size
    architecture = teacher.architecture.to_dict()
    said = {
        **targets_of(recipe, vocab_size),
        "dtype": cache.dtype,
        "num_samples": num_samples,
        "shard_samples": cache.shard_samples,
        "precision": recipe.teacher.precision or recipe.precision,
        "tokenizer": tokenizer.fingerprint,
        **describe_data(recipe, tokenizer),
        "teacher": {"checkpoint": str(folder), "architecture": architecture, **identify_weights(folder, iteration)},
    }
    return json.loads(json.dumps(said))


def check_cache_serves(
    recipe: Recipe, folder: Path, tokenizer: Tokenizer | None, architecture: Architecture
) -> dict[str, Any]:
    """The settings of distill.teacher=cache:`folder`, for a student of `architecture`.

    Raises InputError where it was made for another tokenizer, vocabulary, data, order or teacher, where it cannot serve
    the loss, where it is not whole, and where the run that is gone on with has had other targets so far.
    """
    reader = CacheReader(folder)
    settings, given = reader.settings, f"{KEY}={recipe.distill.teacher}"
    require_settings(folder / DESCRIPTION, settings, ("tokenizer",))
    require_settings(folder / DESCRIPTION, settings["teacher"], ("checkpoint", "iteration", "weights"))
    check_served(settings, recipe.distill, given)
    if (theirs := settings["vocab_size"]) != (ours := architecture.vocab_size):
        rule = f"is of a teacher with vocab_size={theirs}, and the student has {ours}"
        raise unfit(recipe, rule, "a student is distilled from a teacher of the same vocabulary")
    check_teacher(recipe, settings)
    if recipe.distill.checkpoint:
        refuse_other_targets(Path(recipe.distill.checkpoint), settings, given)
    if tokenizer is not None:
        if not tokenizer.is_named_by(maker := settings["tokenizer"]):
            named = f"{tokenizer.path}, {tokenizer.fingerprint[:12]}"
            rule = f"was made with another tokenizer ({maker[:12]}) than the student's ({named})"
            remedy = "make it anew from the student's data (allow=[other_tokenizer] takes its ids as they are)"
            raise unfit(recipe, rule, remedy)
        stored = flat(settings)
        for name, value in flat(describe_data(recipe, tokenizer)).items():
            if stored.get(name) != value:
                rule = f"was made from other data: {name} is {stored.get(name)!r} there and {value!r} here"
                raise unfit(recipe, rule, "give the data it was made from, or make it anew")
    needed, there = samples_needed(recipe), settings["num_samples"]
    if there < needed:
        rule = f"holds the first {there:,} samples, and distill.tokens={recipe.distill.tokens} takes {needed:,}"
        raise unfit(recipe, rule, "run `cache` again for as many, which adds what is missing, or lower distill.tokens")
    if missing := reader.missing_shards(needed):
        rule = f"is not finished: {len(missing)} of its shards are missing, the first is {missing[0]}"
        raise unfit(recipe, rule, "run `cache` again, which writes what is missing")
    return settings


def unfit(recipe: Recipe, rule: str, remedy: str) -> InputError:
    """For a cache that does not serve `distill`."""
    return InputError(KEY, recipe.distill.teacher, rule, remedy)


def check_teacher(recipe: Recipe, settings: dict[str, Any]) -> None:
    """Raise InputError where the recipe names another teacher than the one that was asked; it need not be there."""
    named = recipe.teacher.checkpoint
    if not named or not Path(named).is_dir():
        return
    folder, iteration = find_checkpoint(named, "teacher.checkpoint")
    there, here = settings["teacher"], identify_weights(folder, iteration)
    same = all(there[name] == here[name] for name in here)
    if here["weights"] is None:
        # Nothing says what is in the files but where they lie.
        same = same and Path(there["checkpoint"]).resolve() == folder.resolve()
    if not same or there["architecture"] != json.loads(json.dumps(read_architecture(folder).to_dict())):
        theirs = f"{there['checkpoint']}, iteration {there['iteration']}"
        rule = f"was made by another teacher ({theirs}) than teacher.checkpoint={named}, iteration {iteration}"
        raise unfit(recipe, rule, "make it anew, or leave teacher.checkpoint out")


def samples_needed(recipe: Recipe) -> int:
    """Samples that `distill.tokens` takes. Raises InputError where they are not all of one length."""
    length = recipe.data.sequence_length
    needed = plan_timetable(recipe.distill, length, "distill").samples_needed()
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
