"""`inspect`: what a folder or file is. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minitron_mcore.errors import InputError
from minitron_mcore.jobs.inputs import require
from minitron_mcore.jobs.job import NOTHING, Item, Job, Promises
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.world import World

ONE_OF = "a checkpoint, a Hugging Face folder, a scores file, a plan, or the folder of a run or of a search"


@dataclass(frozen=True, kw_only=True)
class InspectJob(Job):
    """To say what `path` is."""

    path: Path


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING) -> InspectJob:
    """`path`, which must be there. Raises InputError."""
    require(recipe, {"path": "what to inspect, as in minitron inspect PATH"})
    path = Path(str(recipe.path))
    if not path.exists():
        raise InputError("path", path, "is not there", f"name {ONE_OF}")
    return InspectJob(recipe, (Item("path", str(path), "what is inspected"),), path=path)
