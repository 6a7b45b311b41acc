"""What the stages that have no job yet share."""

from __future__ import annotations

from minitron_mcore.jobs.inputs import output_folder
from minitron_mcore.jobs.layouts import asked_shape, check_model, refuse_context
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime import parallel
from minitron_mcore.runtime.start import Runtime

__all__ = ["asked_shape", "check_model", "lay_out", "output_folder", "refuse_context"]


def lay_out(recipe: Recipe, runtime: Runtime) -> None:
    """Process groups and seeds of the recipe; every rank calls."""
    parallel.lay_out(recipe.parallel, recipe.seed, runtime.world_size)
