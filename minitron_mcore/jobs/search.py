"""`search`: the shapes of a grid that are within the budgets, listed or ranked by short distillations. Pure.

output/candidates.json, candidates.csv     every candidate: its shape, what it costs, and how it fared
output/search.png, curves.png              losses against cost, and against tokens
output/candidates, winner                  of the trials (jobs/trials.py)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError
from minitron_mcore.files import first_line, kind_of
from minitron_mcore.jobs.inputs import output_folder, require
from minitron_mcore.jobs.job import NOTHING, Item, Job, Promises
from minitron_mcore.jobs.shape import find_shape
from minitron_mcore.jobs.trials import Trial, Trials, resolve_trials
from minitron_mcore.pruning.plan import export_warnings
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.devices import machine_of
from minitron_mcore.runtime.world import World
from minitron_mcore.search.candidates import TIMED, Candidate, figures_of
from minitron_mcore.search.halving import RESULT
from minitron_mcore.search.space import Space, find_space, nearest_to_middle
from minitron_mcore.tables import counted

JSON, CSV, PLOT, CURVES = "candidates.json", "candidates.csv", "search.png", "curves.png"


@dataclass(frozen=True, kw_only=True)
class SearchJob(Job):
    """The candidates of `space`, shapes of `teacher`, to the folder `target`.

    where: what says the teacher's shape. trials: how some or all of them are ranked; None: they are only listed.
    """

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
    """`search.*` and a teacher's shape, or its checkpoint -> the folder `output`. Raises InputError."""
    require(recipe, {"output": "the folder to write to"})
    folder = output_folder(recipe.output, "output")
    if kind_of(folder) == "is a checkpoint":
        raise InputError("output", folder, "is a checkpoint", "name another folder")
    teacher, where = find_shape(recipe, promises)
    space = space_of(recipe, teacher)
    check_list(folder, teacher)
    tried = tried_of(recipe, space)
    trials = resolve_trials(recipe, world, promises, tried, folder)
    names = (JSON, CSV, PLOT, CURVES) if trials else (JSON, CSV)
    makes = tuple(Item("output", str(folder / name), counted(len(space.candidates), "candidate")) for name in names)
    return SearchJob(
        recipe,
        reads=trials.reads if trials else (),
        makes=(*makes, *(trials.makes if trials else ())),
        notes=(*unused(recipe), *(trials.notes if trials else ()), *not_exported(tried)),
        teacher=teacher,
        where=where,
        space=space,
        target=folder,
        trials=trials,
    )


def unused(recipe: Recipe) -> list[str]:
    """What the recipe says that a search does not look at."""
    if not recipe.student.is_named:
        return []
    return ["student.* has no effect, because the candidates' shapes come from search.*"]


def check_list(folder: Path, teacher: Architecture) -> None:
    """Raise InputError where candidates were tried in `folder` below another teacher, whose list would be lost."""
    path = folder / JSON
    if path.is_file() and any((folder / "candidates").glob(f"*/{RESULT}")):
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))["teacher"]
        except (ValueError, TypeError, KeyError) as error:
            rule = f"is not the list that a search writes ({first_line(error)})"
            raise InputError(
                "output", path, rule, "delete it: it is written anew from what the candidates gave"
            ) from error
        if stored != json.loads(json.dumps(teacher.to_dict())):
            raise InputError("output", folder, "holds a search below another teacher", "name another folder")


def not_exported(candidates: Sequence[Candidate | Trial]) -> list[str]:
    """Why some of `candidates` could not become a Hugging Face folder, in words."""
    return [f"{each.name}: {why}" for each in candidates for why in export_warnings(each.architecture)]


def space_of(recipe: Recipe, teacher: Architecture) -> Space:
    """The grid of the recipe over `teacher`. Raises InputError, also where a budget needs a machine and none is
    known."""
    timed = {*recipe.search.budget.given()} & {*TIMED}
    machine = machine_of(recipe.cluster) if timed or recipe.cluster.device else None

    def figures(shape: Architecture) -> dict[str, float]:
        return figures_of(shape, recipe.data.sequence_length, recipe.serving, machine)

    return find_space(recipe.search, teacher, recipe.prune.divisible_by, recipe.parallel, figures)


def tried_of(recipe: Recipe, space: Space) -> list[Candidate]:
    """The candidates of `space` that are to be trained."""
    return nearest_to_middle(space.candidates, recipe.search.budget, recipe.search.most)


def candidates_of(recipe: Recipe, teacher: Architecture) -> list[Candidate]:
    """Those that a search by `recipe` trains. Raises InputError."""
    return tried_of(recipe, space_of(recipe, teacher))


def winner_folders(output: Path) -> tuple[Path, Path]:
    """Where a search into `output` leaves its best candidate: (pruned, distilled)."""
    return output / "winner" / "pruned", output / "winner" / "distilled"
