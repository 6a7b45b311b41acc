"""`search`: the shapes of a grid that are within the budgets, listed or ranked by short distillations. Pure.

output/candidates.json, candidates.csv      every candidate: its shape, and what it costs
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError
from minitron_mcore.files import kind_of
from minitron_mcore.jobs.inputs import output_folder, require
from minitron_mcore.jobs.job import NOTHING, Item, Job, Promises
from minitron_mcore.jobs.shape import find_shape
from minitron_mcore.jobs.trials import Trials, resolve_trials
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.devices import machine_of
from minitron_mcore.runtime.world import World
from minitron_mcore.search.candidates import TIMED, Candidate, figures_of
from minitron_mcore.search.space import Space, find_space


@dataclass(frozen=True, kw_only=True)
class SearchJob(Job):
    """The candidates of `space`, shapes of `teacher`, to the folder `target`. where: what says the teacher's shape.
    trials: what ranks them; None where they are only listed."""

    teacher: Architecture
    where: str
    space: Space
    target: Path
    trials: Trials | None

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        return self.space.candidates

    @property
    def needs_ranks(self) -> bool:
        return self.trials is not None


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING) -> SearchJob:
    """`search.*` and a teacher's shape -> the folder `output`. Raises InputError."""
    require(recipe, {"output": "the folder to write to"})
    folder = output_folder(recipe.output, "output")
    if kind_of(folder) == "is a checkpoint":
        raise InputError("output", folder, "is a checkpoint", "name another folder")
    teacher, where = find_shape(recipe, promises)
    space = space_of(recipe, teacher)
    trials = resolve_trials(recipe, world, promises, space.candidates, folder)
    lists = tuple(
        Item("output", str(folder / name), f"{len(space.candidates)} candidates")
        for name in ("candidates.json", "candidates.csv")
    )
    ranked: dict[str, Any] = {}
    if trials:
        ranked = {"reads": trials.reads, "makes": (*lists, *trials.makes), "notes": trials.notes}
    job = SearchJob(recipe, makes=lists, teacher=teacher, where=where, space=space, target=folder, trials=trials)
    return replace(job, **ranked)


def space_of(recipe: Recipe, teacher: Architecture) -> Space:
    """The grid of the recipe over `teacher`. Raises InputError, also where a budget needs a machine and none is
    known."""
    timed = {*recipe.search.budget.given()} & {*TIMED}
    machine = machine_of(recipe.cluster) if timed or recipe.cluster.device else None

    def figures(shape: Architecture) -> dict[str, float]:
        return figures_of(shape, recipe.data.sequence_length, recipe.serving, machine)

    return find_space(recipe.search, teacher, recipe.prune.divisible_by, recipe.parallel, figures)
