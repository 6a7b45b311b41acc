"""`report`: the page of a run, or of a part of one. Pure."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from minitron_mcore.data.corpus import check_file
from minitron_mcore.errors import InputError
from minitron_mcore.jobs.inputs import require
from minitron_mcore.jobs.iterate import Step
from minitron_mcore.jobs.job import NOTHING, Item, Job, Promises
from minitron_mcore.jobs.run import Road, lay_road
from minitron_mcore.recipe import Recipe, with_keys
from minitron_mcore.report.gather.place import Place, find_place
from minitron_mcore.runtime.world import World

PAGE = "report.html"


@dataclass(frozen=True, kw_only=True)
class ReportJob(Job):
    """What lies in `folder` is shown in the file `target`. steps: (name in done/, title) of a run's; () if unknown."""

    folder: Path
    target: Path
    steps: tuple[tuple[str, str], ...] = ()

    @property
    def needs_ranks(self) -> bool:
        return False


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING) -> ReportJob:
    """`path`, a run or a part of one -> `report.output`, report.html in the folder where it is left out. Raises
    InputError."""
    require(recipe, {"path": "the folder to report on, as in minitron report PATH"})
    place = find_place(Path(str(recipe.path)))
    target = Path(recipe.report.output or place.folder / PAGE)
    check_file(str(target), "report.output")
    reads = (Item("path", str(place.folder), f"a {place.kind}"),)
    makes = (Item("report.output", str(target), "the page"),)
    return ReportJob(recipe, reads, makes, folder=place.folder, target=target, steps=steps_of(place, world))


class Titles(Road):
    """A road of which only the titles are wanted: what a step needs may have been moved since."""

    def lay(self, step: Step) -> Job | None:
        try:
            return super().lay(step)
        except (InputError, OSError):
            self.steps.append((step, None))
            return None


def steps_of(place: Place, world: World) -> tuple[tuple[str, str], ...]:
    """Every step of a run, done or not; () where that cannot be known, as of a run whose teacher has been moved."""
    if place.kind != "run" or place.recipe is None:
        return ()
    # As many ranks as hold one copy of its model: the steps are the same with more.
    road = Titles(place.folder, replace(world, size=place.recipe.parallel.replica_ranks), NOTHING)
    recipe = with_keys(place.recipe, {"output": str(place.folder)})
    with suppress(InputError, OSError):
        lay_road(recipe, road)
        return tuple((step.mark(place.folder).stem, step.title) for step, _ in road.steps)
    return ()
