"""`evaluate`: held-out LM loss and perplexity of a checkpoint. Pure."""

from __future__ import annotations

from pathlib import Path

from minitron_mcore.data.corpus import check_file
from minitron_mcore.data.described import describe, held_out_part
from minitron_mcore.jobs.inputs import TEXT, data_items, find_reader, require
from minitron_mcore.jobs.job import NOTHING, Item, ModelJob, Promises
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.world import World


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING) -> ModelJob:
    """`checkpoint` -> `results`, by default results.json beside the checkpoint. Raises InputError."""
    require(recipe, {"checkpoint": "the folder of a checkpoint"}, {} if recipe.data.valid else TEXT)
    model = find_reader(recipe, world, promises, "checkpoint")
    target = Path(recipe.results) if recipe.results else model.folder / "results.json"
    check_file(str(target), "results")
    part = held_out_part(recipe.data, recipe.evaluate.samples, promises.prefixes)
    described = describe(recipe.data, [part], model.tokenizer, promises.prefixes)
    makes = (Item("results", str(target), "held-out losses"),)
    return ModelJob(recipe, (model, *data_items(described)), makes, model=model, target=target)
