"""The jobs of SLURM that a recipe becomes: what each runs, asks for and waits for. Pure.

output/submit/STAGE.yaml       the recipe that the job runs
output/submit/STAGE.sbatch     the template, filled in
output/submit/STAGE-ID.log     what it printed
output/submit/jobs.json        ids, by stage
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_mcore.jobs.job import Item, Job, Model, absolute
from minitron_mcore.keys import flat
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.slurm import LAUNCH, Template, job_name
from minitron_mcore.runtime.world import World
from minitron_mcore.tables import counted

JOBS = "jobs.json"


@dataclass(frozen=True)
class Size:
    """`nodes` with `tasks` each, one a GPU, for `time` as SLURM writes it."""

    nodes: int
    tasks: int
    time: str
    world: World

    def __str__(self) -> str:
        return f"{counted(self.nodes, 'node')} x {counted(self.tasks, 'task')}"


@dataclass(frozen=True)
class Stage:
    """One job: `minitron verb` by `recipe`, an array of `array` tasks where that is not 0.

    job: what it will do, for one that makes something. needs: what must be there besides what that reads. after: names
    of the stages that it waits for.
    """

    name: str
    title: str
    verb: str
    recipe: Recipe
    size: Size
    job: Job | None = None
    array: int = 0
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def command(self, folder: Path) -> str:
        """Its words for minitron, quoted for a shell."""
        words = shlex.join([self.verb, "--config", str(folder / f"{self.name}.yaml")])
        return f'{words} "{self.verb}.share=$SLURM_ARRAY_TASK_ID/{self.array}"' if self.array else words

    def script(self, folder: Path, template: Template) -> str:
        """Raises InputError where the folder's name cannot be in one."""
        values = {
            "name": job_name(f"{self.recipe.name}-{self.name}"),
            "nodes": self.size.nodes,
            "ntasks_per_node": self.size.tasks,
            "gpus_per_node": self.size.tasks,
            "time": self.size.time,
            "launcher": shlex.quote(str(LAUNCH / "slurm.sbatch")),
            "command": self.command(folder),
        }
        return template.filled(values)

    def sbatch(self, folder: Path, ids: dict[str, str]) -> list[str]:
        """The words that submit its script. ids: of the stages before, by name."""
        log = f"{str(folder / self.name).replace('%', '%%')}-{'%A_%a' if self.array else '%j'}.log"
        words = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes"]
        if self.after:
            words.append(f"--dependency=afterok:{':'.join(ids[name] for name in self.after)}")
        words += [f"--array=0-{self.array - 1}"] if self.array else []
        return [*words, f"--output={log}", str(folder / f"{self.name}.sbatch")]


@dataclass(frozen=True, kw_only=True)
class SubmitJob(Job):
    """`stages` in an order in which each comes after those that it waits for, from `template` into `folder`/submit.

    skipped: titles of steps that are done.
    """

    folder: Path
    template: Template
    stages: tuple[Stage, ...]
    skipped: tuple[str, ...] = ()

    @property
    def needs_ranks(self) -> bool:
        return False

    @property
    def place(self) -> Path:
        return absolute(self.folder) / "submit"


def with_dependencies(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Each after the earlier ones that make what it reads or its recipe names, besides those that it names itself."""
    made = {stage.name: [*_paths(stage.job.makes)] if stage.job and not stage.array else [] for stage in stages}
    behind: dict[str, set[str]] = {}
    found: list[Stage] = []
    for stage in stages:
        named = {*map(absolute, stage.needs)}
        if stage.job:
            named |= {*_paths(stage.job.reads), *_named(stage.job.recipe)}
        near = {*stage.after} | {
            other.name
            for other in found
            if any(path == place or place in path.parents for path in named for place in made[other.name])
        }
        behind[stage.name] = near.union(*(behind[name] for name in near))
        # One that another waits for itself need not be named.
        direct = [each.name for each in found if each.name in near and not any(each.name in behind[n] for n in near)]
        found.append(dataclasses.replace(stage, after=tuple(direct)))
    return tuple(found)


def _paths(items: Sequence[Model | Item]) -> Iterator[Path]:
    for item in items:
        yield absolute(item.folder if isinstance(item, Model) else item.path)


def _named(recipe: Recipe) -> Iterator[Path]:
    """Every text of the recipe as the path that it may be."""

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        for each in value if isinstance(value, list) else ():
            yield from texts(each)

    settings = dataclasses.asdict(recipe)
    for name, value in flat(settings).items():
        for text in texts(value):
            if name.partition(".")[0] not in ("run", "submit", "cluster") and "\0" not in text and "\n" not in text:
                yield absolute(text)
