"""`evaluate`: held-out LM loss and perplexity of a checkpoint. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minitron_mcore.data.corpus import check_file
from minitron_mcore.data.described import describe, held_out_part
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.jobs.inputs import TEXT, find_model, require
from minitron_mcore.jobs.job import NOTHING, Item, Job, Model, Promises
from minitron_mcore.jobs.layouts import check_model
from minitron_mcore.jobs.tokenizers import model_tokenizer
from minitron_mcore.jobs.training import data_items
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.world import World


@dataclass(frozen=True, kw_only=True)
class EvaluateJob(Job):
    """The held-out losses of `model` into the file `target`."""

    model: Model
    tokenizer: Tokenizer | None
    target: Path


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING) -> EvaluateJob:
    """`checkpoint` -> `results`, by default results.json beside the checkpoint. Raises InputError."""
    require(recipe, {"checkpoint": "the folder of a checkpoint"}, {} if recipe.data.valid else TEXT)
    model = find_model(recipe.checkpoint, "checkpoint", promises)
    target = Path(recipe.results) if recipe.results else model.folder / "results.json"
    check_file(str(target), "results")
    check_model(model.architecture, recipe, world)
    tokenizer = model_tokenizer(recipe, model, promises)
    part = held_out_part(recipe.data, recipe.evaluate.samples, promises.prefixes)
    described = describe(recipe.data, [part], tokenizer, promises.prefixes)
    return EvaluateJob(
        recipe=recipe,
        reads=(model, *data_items(described)),
        makes=(Item("results", str(target), "held-out losses"),),
        model=model,
        tokenizer=tokenizer,
        target=target,
    )
