"""`submit`: a recipe as jobs of SLURM that wait for each other, each of its own size. Pure.

The steps of `run` are resolved as `run` resolves them, each for the ranks of its own job and with what earlier ones
promise; so what could not run is refused before anything is queued. A step's job is `minitron run` with run.only, and
the last one is `minitron run`, which finds all done and closes the run. A search is an array for each of its stops, and
an ablation one: each task takes a share, and the job after them finds all trained, or evaluated, and ranks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from minitron_mcore.errors import InputError
from minitron_mcore.jobs.ablate import AblateJob
from minitron_mcore.jobs.batch import Size, Stage, SubmitJob, with_dependencies
from minitron_mcore.jobs.dry_run import planned_world
from minitron_mcore.jobs.duration import seconds_for
from minitron_mcore.jobs.inputs import output_folder
from minitron_mcore.jobs.iterate import Step
from minitron_mcore.jobs.job import NOTHING, Job, Promises, absolute
from minitron_mcore.jobs.run import RESULTS, Road, lay_road, notes_of, run_folder
from minitron_mcore.jobs.score import ScoreJob
from minitron_mcore.jobs.search import SearchJob
from minitron_mcore.jobs.trials import Trial, left_at
from minitron_mcore.recipe import Recipe, with_keys
from minitron_mcore.runtime.config import ParallelConfig, StageConfig, seconds_of
from minitron_mcore.runtime.devices import machine_of
from minitron_mcore.runtime.slurm import read_template, time_text
from minitron_mcore.runtime.world import World
from minitron_mcore.search.halving import kept_of
from minitron_mcore.tables import counted

TRAINS = ("train", "correct", "distill", "align", "search")
ALONE = ("tokenizer", "preprocess")  # the work of one process
CLOSING = "report"
SETTINGS_TASKS = 8  # of an ablation: each loads the teacher, and a setting takes little
MARGIN, START = 1.25, 1800  # of an estimate, which leaves out starting, validating and saving: share, and seconds


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING) -> SubmitJob:
    """The recipe's submit.verb as jobs. world: of this machine, whose device the nodes' is unless `cluster` says.

    Raises InputError for what a stage would refuse, a size that its layout does not divide, and a template that lacks a
    field.
    """
    template = read_template(recipe.cluster.template)
    sizes, skipped = Sizes(recipe, world), []
    if recipe.submit.verb == "run":
        road = Pipeline(run_folder(recipe), world, promises, sizes=sizes)
        lay_road(with_keys(recipe, {"run.only": None}), road)
        skipped = [step.title for step, job in road.steps if job is None]
        folder, stages, notes = road.folder, road.stages, notes_of(recipe, road)
        sizes.know(CLOSING, "run")
        if stages or not (folder / RESULTS).is_file():
            size = dataclasses.replace(sizes.of(CLOSING, "run"), time=sizes.time(CLOSING, "run", 0.0))
            stages.append(Stage(CLOSING, "close the run", "run", with_keys(recipe, {"run.only": None}), size))
    else:
        folder = output_folder(recipe.output, "output")
        step = Step(recipe.submit.verb, recipe.submit.verb, recipe.submit.verb, recipe)
        job, size = sizes.resolve(step, promises)
        if isinstance(job, SearchJob) and job.trials is None:
            remedy = "use `minitron search`, or set search.train=true"
            raise InputError("search.train", False, "only lists candidates, which needs no job", remedy)
        stages, notes = [*stages_of(step, job, size, sizes, promises)], job.notes
    sizes.refuse_unknown()
    found = with_dependencies(stages)
    if found and found[-1].name == CLOSING:
        waited_for = {name for stage in found for name in stage.after}
        last = tuple(stage.name for stage in found[:-1] if stage.name not in waited_for)
        found = (*found[:-1], dataclasses.replace(found[-1], after=last))
    notes = (*notes, *sizes.notes)
    return SubmitJob(recipe, notes=notes, folder=folder, template=template, stages=found, skipped=tuple(skipped))


@dataclass
class Pipeline(Road):
    """Lays each step for the ranks of its own job."""

    sizes: Sizes = field(kw_only=True)
    stages: list[Stage] = field(default_factory=list)

    def lay(self, step: Step) -> Job | None:
        job = None
        self.sizes.know(step.word, step.verb)
        if not step.mark(self.folder).is_file():
            job, size = self.sizes.resolve(step, self.promises)
            only = with_keys(self.sizes.recipe, {"run.only": step.word})
            for stage in stages_of(step, job, size, self.sizes, self.promises):
                told = {"verb": "run", "recipe": only} if stage.name == step.word else {}
                self.stages.append(dataclasses.replace(stage, needs=tuple(self.looked_at), **told))
            self.promises = self.promises.after(job)
        self.steps.append((step, job))
        return job


@dataclass
class Sizes:
    """How large, and how long, each stage's job is, by `cluster` of the recipe."""

    recipe: Recipe
    started: World
    notes: list[str] = field(default_factory=list)
    _names: dict[str, None] = field(default_factory=dict)

    def know(self, *names: str) -> None:
        """Names that cluster.stages may have."""
        self._names |= dict.fromkeys(names)

    def refuse_unknown(self) -> None:
        """Raise InputError where cluster.stages names what is no stage."""
        for name in self.recipe.cluster.stages:
            if name not in self._names:
                rule, remedy = "is no stage of this recipe", f"its stages are {', '.join(self._names)}"
                raise InputError(f"cluster.stages.{name}", None, rule, remedy)

    def said(self, word: str, verb: str, name: str) -> tuple[str, Any]:
        """(key, value) of what cluster.stages says of a step, by its name or else its verb; (key, None): nothing."""
        for each in (word, verb):
            config = self.recipe.cluster.stages.get(each, StageConfig())
            if (value := getattr(config, name)) is not None:
                return f"cluster.stages.{each}.{name}", value
        return f"cluster.stages.{word}.{name}", None

    def of(self, word: str, verb: str) -> Size:
        """The nodes and tasks of a stage, its time left open. Raises InputError where they cannot hold whole copies of
        the model."""
        cluster, parallel = self.recipe.cluster, self.recipe.parallel
        here = min(cluster.gpus_per_node, cluster.gpus or cluster.gpus_per_node)
        tasks = self.said(word, verb, "gpus_per_node")[1] or (1 if verb in ALONE else here)
        key, nodes = self.said(word, verb, "nodes")
        copies = 1 if verb in ALONE else parallel.replica_ranks
        fewest = math.lcm(copies, tasks) // tasks
        if nodes is None and verb in TRAINS and cluster.gpus:
            key, nodes = "cluster.gpus", -(-cluster.gpus // tasks)
            if cluster.gpus % tasks:
                rule = f"is not whole nodes of {tasks} tasks"
                raise InputError(key, cluster.gpus, rule, f"the nearest is {max(nodes - 1, 1) * tasks}")
        if nodes is None:
            nodes = fewest
        if nodes * tasks % copies:
            near = max(nodes // fewest, 1) * fewest
            rule = f"x {counted(tasks, 'task')} of a node = {nodes * tasks} ranks, of which a copy of the model takes "
            rule += f"{copies} ({layout_words(parallel)})" if key != "cluster.gpus" else f"{copies}"
            value = nodes if key != "cluster.gpus" else cluster.gpus
            raise InputError(key, value, rule, f"{near} {'nodes divide' if near > 1 else 'node divides'} so")
        return Size(nodes, tasks, "", self.world(nodes, tasks))

    def world(self, nodes: int, tasks: int) -> World:
        """The ranks of a job, on the GPUs that `cluster` describes, else on a device as this machine's."""
        cluster, size = self.recipe.cluster, nodes * tasks
        if (cluster.gpus, cluster.device, cluster.gpu_memory) == (None, None, None):
            return World(size=size, local_size=tasks, device=self.started.device, engine=self.started.engine)
        return planned_world(dataclasses.replace(cluster, gpus=size, gpus_per_node=tasks, stages={}), self.started)

    def resolve(self, step: Step, promises: Promises) -> tuple[Job, Size]:
        """What `step` does on its ranks. Raises InputError with what the step refuses, and where."""
        self.know(step.word, step.verb)
        size = self.of(step.word, step.verb)
        try:
            job = step.resolve(size.world, promises)
        except InputError as error:
            where = f"this is {step.word} on {size}"
            remedy = f"{error.remedy} ({where})" if error.remedy else where
            raise type(error)(error.key, error.value, error.rule, remedy) from error
        return job, size

    def time(self, word: str, verb: str, seconds: float | None) -> str:
        """What a job that is estimated at `seconds` asks for; None: nothing is known of it."""
        cluster, (_, own) = self.recipe.cluster, self.said(word, verb, "time")
        if own or seconds is None:
            return own or cluster.time
        needed, most = MARGIN * seconds, seconds_of(cluster.time)
        if needed > most:
            hours = f"{word} is estimated at {seconds / 3600:,.1f} hours and asks for cluster.time={cluster.time}"
            self.notes.append(f"{hours}: SLURM starts it about {math.ceil(needed / most)} times")
        return min(time_text(needed + START), cluster.time, key=seconds_of)


def stages_of(step: Step, job: Job, size: Size, sizes: Sizes, promises: Promises) -> Iterator[Stage]:
    """The jobs of a step: itself, behind the scores, unless they are among the promises, and the arrays of a search or
    an ablation."""
    word, machine = step.word, machine_of(sizes.recipe.cluster)

    def sized(name: str, seconds: float | None) -> Size:
        sizes.know(name)
        return dataclasses.replace(size, time=sizes.time(name, step.verb, seconds))

    own = Stage(word, step.title, step.verb, step.recipe, size, job)
    if isinstance(job, SearchJob) and job.trials:
        scores, chain = scoring_stages(job.trials.scoring, sizes, promises), []
        yield from scores
        before = tuple(each.name for each in scores)
        for stop, alive in stops_left(job):
            count = sizes.said(word, step.verb, "tasks")[1] or -(-alive // job.trials.side_by_side)
            count = min(count, alive)
            name, told = f"{word}-{stop}", with_keys(step.recipe, {"search.stop": stop, "search.share": None})
            title = f"{step.title}, stop {stop} of {len(job.trials.stops)}"
            seconds = seconds_for(job, size.world, machine, stop=stop, share=-(-alive // count))
            chain.append(Stage(name, title, step.verb, told, sized(name, seconds), job, array=count, after=before))
            before = (name,)
        yield from chain
        yield dataclasses.replace(own, size=sized(word, None), after=before)
    elif isinstance(job, AblateJob):
        scores = scoring_stages(job.scoring, sizes, promises)
        yield from scores
        before = tuple(each.name for each in scores)
        if left := [setting for setting in job.grid if setting not in job.done]:
            count = min(sizes.said(word, step.verb, "tasks")[1] or SETTINGS_TASKS, len(left))
            name = f"{word}-shares"
            title, long = f"{step.title}, by shares", sized(name, None)
            yield Stage(name, title, step.verb, step.recipe, long, job, array=count, after=before)
            before = (name,)
        yield dataclasses.replace(own, size=sized(word, None), after=before)
    else:
        yield dataclasses.replace(own, size=sized(word, seconds_for(job, size.world, machine)))


def scoring_stages(scoring: ScoreJob | None, sizes: Sizes, promises: Promises) -> list[Stage]:
    """The scores that the tasks of an array share, where they are not there and no step before makes them."""
    if scoring is None or scoring.is_there or absolute(scoring.target) in promises.items:
        return []
    step = Step("score", "score the teacher", "score", scoring.recipe)
    job, size = sizes.resolve(step, promises)
    return [*stages_of(step, job, size, sizes, promises)]


def stops_left(job: SearchJob) -> Iterator[tuple[int, int]]:
    """(number, candidates) of each stop of a search that not all candidates have reached."""
    assert job.trials is not None
    trials, keep = job.trials, job.recipe.search.halving.keep
    alive = len(trials.trials)
    for stop in range(1, len(trials.stops) + 1):
        # What the one after it would need.
        if isinstance(left_at(trials.trials, stop + 1, trials.stops, keep), Trial):
            yield stop, alive
        alive = kept_of(alive, keep)


def layout_words(parallel: ParallelConfig) -> str:
    names = ("tensor", "pipeline", "context")
    sizes = [(name, getattr(parallel, name)) for name in names]
    return " x ".join(f"parallel.{name}={size}" for name, size in sizes if size > 1)
