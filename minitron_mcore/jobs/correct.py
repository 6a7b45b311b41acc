"""`correct`: fine-tune the teacher on the distillation's own data before it teaches. Pure."""

from __future__ import annotations

from minitron_mcore.errors import InputError
from minitron_mcore.jobs.inputs import budget_and_text, require
from minitron_mcore.jobs.job import NOTHING, Promises
from minitron_mcore.jobs.train import TrainingJob, resolve_section
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.world import World


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING) -> TrainingJob:
    """`teacher.checkpoint` trained onward to `correct.tokens`, into `correct.checkpoint`. Raises InputError."""
    needed = {
        "teacher.checkpoint": "the folder of the teacher to correct",
        "correct.checkpoint": "the folder to write to",
    }
    require(recipe, needed, budget_and_text("correct"))
    if recipe.correct.load is not None:
        rule = "is not read: what is corrected is teacher.checkpoint"
        raise InputError("correct.load", recipe.correct.load, rule, "leave it out")
    return resolve_section(recipe, world, promises, "correct", "teacher.checkpoint", ("data", "correct", "teacher"))
