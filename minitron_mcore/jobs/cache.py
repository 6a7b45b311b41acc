"""`cache`: the teacher's targets of the samples that `distill` will train on. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.identity import identity
from minitron_mcore.data.described import describe_training
from minitron_mcore.data.index_size import Wanted
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.distillation.cache.serving import check_served, find_cache
from minitron_mcore.distillation.config import CACHE, CacheConfig
from minitron_mcore.errors import InputError
from minitron_mcore.jobs.cached import describe_data, samples_needed
from minitron_mcore.jobs.inputs import TEXT, budget_and_text, find_model, output_folder, require
from minitron_mcore.jobs.job import NOTHING, Item, Job, Model, Promises
from minitron_mcore.jobs.layouts import check_model, refuse_context
from minitron_mcore.jobs.tokenizers import model_tokenizer
from minitron_mcore.jobs.training import data_items
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.world import World


@dataclass(frozen=True, kw_only=True)
class CacheJob(Job):
    """The targets of `teacher` for `num_samples` samples into `folder`.

    settings: how they are made, as cache.json keeps it. precision: of the teacher's pass.
    """

    folder: Path
    teacher: Model
    tokenizer: Tokenizer | None
    num_samples: int
    precision: str
    settings: dict[str, Any]


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING) -> CacheJob:
    """What is missing of `cache.folder`; the same command goes on where it was cut off, and one that asks for more
    samples adds them. Raises InputError."""
    needed = {"cache.folder": "the folder to write to", "teacher.checkpoint": "the folder of a checkpoint"}
    require(recipe, needed, TEXT if recipe.cache.num_samples else budget_and_text("distill"))
    refuse_context(recipe, "cache")
    cache = recipe.cache
    folder = output_folder(cache.folder, "cache.folder")
    teacher = find_model(recipe.teacher.checkpoint, "teacher.checkpoint", promises)
    check_model(teacher.architecture, recipe, world)
    check_top_k(cache, teacher.architecture)
    tokenizer = model_tokenizer(recipe, teacher, promises)
    num_samples = cache.num_samples or samples_needed(recipe)
    asked = ("cache.num_samples", num_samples) if cache.num_samples else ("distill.tokens", recipe.distill.tokens)
    wanted = [Wanted(num_samples, recipe.data.sequence_length, *asked)]
    described = describe_training(recipe.data, tokenizer, wanted, promises.prefixes)
    precision = recipe.teacher.precision or recipe.precision
    settings: dict[str, Any] = {}
    notes: list[str] = []
    if teacher.iteration is not None and tokenizer is not None and not promises.prefixes:
        settings = settings_of(recipe, teacher, tokenizer, num_samples, precision)
        find_cache(folder, settings)
        notes += refusal_to_come(settings, recipe, folder)
    return CacheJob(
        recipe=recipe,
        reads=(teacher, *data_items(described)),
        makes=(Item("cache.folder", str(folder), f"targets of {num_samples:,} samples"),),
        notes=tuple(notes),
        folder=folder,
        teacher=teacher,
        tokenizer=tokenizer,
        num_samples=num_samples,
        precision=precision,
        settings=settings,
    )


def check_top_k(cache: CacheConfig, architecture: Architecture) -> None:
    """Raise InputError where the teacher has fewer tokens than are to be kept."""
    if cache.method == "top_k" and cache.top_k > architecture.vocab_size:
        rule = f"is more than the teacher's vocab_size={architecture.vocab_size}"
        raise InputError("cache.top_k", cache.top_k, rule, "lower it, or set 0 to keep all")


def settings_of(
    recipe: Recipe, teacher: Model, tokenizer: Tokenizer, num_samples: int, precision: str
) -> dict[str, Any]:
    """Everything that decides what the targets are, and which samples they are of."""
    cache, (folder, iteration) = recipe.cache, teacher.place
    temperature = recipe.distill.temperature if cache.temperature is None else cache.temperature
    said = {
        **how_drawn(cache, temperature, teacher.architecture),
        "num_samples": num_samples,
        "shard_samples": cache.shard_samples,
        "precision": precision,
        "tokenizer": tokenizer.fingerprint,
        **describe_data(recipe, tokenizer),
        "teacher": {
            "checkpoint": str(folder),
            "architecture": teacher.architecture.to_dict(),
            **identity(folder, iteration),
        },
    }
    return json.loads(json.dumps(said))


def how_drawn(cache: CacheConfig, temperature: float, architecture: Architecture) -> dict[str, Any]:
    """The settings that decide how targets follow from logits."""
    said: dict[str, Any] = {"method": cache.method, "temperature": temperature, "vocab_size": architecture.vocab_size}
    if cache.method == "sampled":
        said |= {"draws": cache.draws, "proposal_temperature": cache.proposal_temperature}
    else:
        said["top_k"] = cache.top_k or architecture.vocab_size
    return {**said, "dtype": cache.dtype}


def refusal_to_come(settings: dict[str, Any], recipe: Recipe, folder: Path) -> list[str]:
    """A note where `distill` of the same recipe would not take the targets."""
    try:
        check_served(settings, recipe.distill, f"distill.teacher={CACHE}{folder}")
    except InputError as error:
        return [f"`distill` will refuse what `cache` writes by this recipe: {error}"]
    return []
