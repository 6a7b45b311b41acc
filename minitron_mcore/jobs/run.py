"""`run`: the whole recipe, step by step; every step is resolved before the first one acts. Pure.

output/tokenizer/tokenizer.model          (unless the recipe names one)
output/data/tokens_text_document.*        (unless the recipe names data)
output/teacher/                           imported from hf, else trained to train.tokens (of a teacher that the recipe
                                          names: results.json)
output/corrected/                         where correct.tokens is given: what is scored, pruned and taught from
output/targets/                           under run.cache: what the teacher says to every sample
output/scores.safetensors                 one scoring pass for all students
output/students/NAME/pruned, distilled    one for each of run.students (step-1 … beside them: jobs/iterate.py)
output/students/NAME/scores.safetensors   under run.chain, of the student before it, which this one is cut from
output/search/                            in place of them, where the recipe names none but a grid (jobs/search.py)
output/baselines/next_token, random       of the first student's shape, on the same tokens
output/hf/NAME                            every distilled student as a Hugging Face folder
output/continuations.jsonl                what teacher and distilled students write to run.prompts
output/results.json                       held-out losses of all of them
output/done/STEP.json                     what a finished step gave
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import find_checkpoint, tokenizer_folder
from minitron_mcore.data.tokenizer_files import has_tokenizer
from minitron_mcore.distillation.config import CACHE
from minitron_mcore.errors import InputError
from minitron_mcore.jobs.continuation import refuse_other_run
from minitron_mcore.jobs.inputs import find_model, output_folder, refuse_context, require
from minitron_mcore.jobs.iterate import Step, check_steps, parts_of, with_baseline
from minitron_mcore.jobs.job import NOTHING, Item, Job, Model, Promises, absolute
from minitron_mcore.jobs.search import SearchJob, not_exported, winner_folders
from minitron_mcore.pruning.config import StudentConfig
from minitron_mcore.recipe import Recipe, with_keys
from minitron_mcore.runtime.config import check_layout
from minitron_mcore.runtime.world import World
from minitron_mcore.search.space import has_grid

SECTIONS = (
    *("input", "hf", "tokenizer", "preprocess", "data", "model", "teacher", "student"),
    *("importance", "prune", "search", "train", "correct", "cache", "distill", "evaluate", "run"),
)
EVALUATE = "evaluate "
RECIPE, RESULTS = "recipe.yaml", "results.json"
ESTIMATE = "estimate.json"  # what may lie in the folder before the run
BASELINE_TITLES = {"next_token": "next-token loss", "random": "random weights"}


@dataclass(frozen=True, kw_only=True)
class RunJob(Job):
    """`steps` in order, into `folder`, each with what it will do; None: it is done. With run.only that one alone."""

    folder: Path
    world: World
    steps: tuple[tuple[Step, Job | None], ...]


class Reached(Exception):  # noqa: N818  # nothing is wrong
    """The one step that is asked for has been laid."""


@dataclass
class Road:
    """Steps are resolved as they are laid, each with what those before it promise. With `only`, a step's word, that one
    alone is: what it needs is there, while others may be under way elsewhere; then Reached is raised."""

    folder: Path
    world: World
    promises: Promises
    only: str | None = None
    leaves_out: tuple[str, ...] = ()  # verbs whose steps are none of it
    steps: list[tuple[Step, Job | None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    finished: dict[str, str] = field(default_factory=dict)  # what to show of, by the name in the closing table
    looked_at: list[str] = field(default_factory=list)  # checkpoints whose shapes say what later steps are

    @property
    def makes(self) -> tuple[Model | Item, ...]:
        """What all of the steps that are left make."""
        return tuple(made for _, job in self.steps if job for made in job.makes)

    def shape_of(self, folder: Path | str, key: str) -> Architecture:
        """Of a checkpoint that is there or promised."""
        self.looked_at.append(str(folder))
        return find_model(folder, key, self.promises).architecture

    def lay(self, step: Step) -> Job | None:
        """The step's job; None where it is done, or left out."""
        if step.verb in self.leaves_out:
            return None
        job, is_wanted = None, self.only in (None, step.word)
        if is_wanted and not step.mark(self.folder).is_file():
            job = step.resolve(self.world, self.promises)
            self.promises = self.promises.after(job)
        self.steps.append((step, job))
        if self.only == step.word:
            raise Reached
        return job

    def add(self, name: str, title: str, verb: str, recipe: Recipe, **options: Any) -> Job | None:
        return self.lay(Step(name, title, verb, recipe, options))

    def evaluate(self, name: str, recipe: Recipe, checkpoint: Path | str, results: Path | None = None) -> None:
        told = {"checkpoint": str(checkpoint), "results": str(results) if results else None}
        self.add(EVALUATE + name, f"evaluate {name}", "evaluate", with_keys(recipe, told))


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING) -> RunJob:
    """Every step of the recipe; the same command goes on where it was cut off. Raises InputError."""
    folder = run_folder(recipe)
    if recipe.run.only is None:
        check_layout(recipe.parallel, world.size)
    road = Road(folder, world, promises, only=recipe.run.only)
    try:
        lay_road(with_keys(recipe, {"run.only": None}), road)
    except Reached:
        road.steps = road.steps[-1:]
    else:
        if road.only is not None:
            names = ", ".join(step.word for step, _ in road.steps)
            raise InputError("run.only", road.only, "is no step of this run", f"its steps are {names}")
    return RunJob(
        recipe, makes=road.makes, notes=notes_of(recipe, road), folder=folder, world=world, steps=tuple(road.steps)
    )


def notes_of(recipe: Recipe, road: Road) -> tuple[str, ...]:
    """What is to be said of the recipe and its steps."""
    idle = has_grid(recipe.search) and not searches(recipe)
    return (*road.notes, *(["search.* has no effect, because the recipe names its students"] if idle else []))


def run_folder(recipe: Recipe) -> Path:
    """The folder of the run. Raises InputError where none is named, or another run, or anything else, is in it."""
    require(recipe, {"output": "the folder of the run"})
    folder = output_folder(recipe.output, "output")
    if recipe.importance.method == "activation":
        refuse_context(recipe, "run")
    refuse_other_run(folder, recipe, SECTIONS, "output")
    refuse_others(folder, "a run")
    return folder


def refuse_others(folder: Path, what: str) -> None:
    """Raise InputError where `folder` holds anything but `what`, which has a recipe."""
    others = [path for path in folder.iterdir() if path.name != ESTIMATE] if folder.is_dir() else []
    if others and not (folder / RECIPE).is_file():
        raise InputError("output", folder, f"holds something other than {what}", "name another folder")


def lay_road(recipe: Recipe, road: Road) -> None:
    """All steps in order, with the recipe that each gets."""
    folder = road.folder
    # All of its trainings have names of their own.
    recipe = with_keys(recipe, {"log.wandb_group": recipe.log.wandb_group or recipe.name})
    base = with_data(recipe, road)
    teacher = recipe.teacher.checkpoint or str(folder / "teacher")
    scores = recipe.scores or str(folder / "scores.safetensors")
    base = with_keys(base, {"teacher.checkpoint": teacher, "scores": scores})
    if recipe.hf and not recipe.teacher.checkpoint:
        road.add("import", "import the teacher", "import", with_keys(base, {"checkpoint": teacher}), replaces=True)
    elif not recipe.teacher.checkpoint:
        told = {"name": f"{recipe.name}-teacher", "train.checkpoint": teacher}
        road.add("train-teacher", "train the teacher", "train", with_keys(base, told))
    shape = road.shape_of(teacher, "teacher.checkpoint")
    # Nothing is written into the folder of a teacher that the recipe names.
    results = folder / "teacher" / "results.json" if recipe.teacher.checkpoint else None
    road.evaluate("teacher", base, teacher, results)
    road.finished["teacher"] = teacher
    if recipe.correct.tokens:
        corrected = str(folder / "corrected")
        told = {"name": f"{recipe.name}-corrected", "correct.checkpoint": corrected}
        road.add("correct-teacher", "correct the teacher", "correct", with_keys(base, told))
        road.evaluate("corrected teacher", base, corrected)
        base = with_keys(base, {"teacher.checkpoint": corrected})
    if recipe.run.cache:
        base = lay_cache(base, road)
    road.add("score", "score the teacher", "score", base)
    if searches(recipe):
        first, pruned = lay_search(base, road)
    else:
        first, pruned = lay_students(base, shape, road)
    for baseline in recipe.run.baselines:
        target, title = folder / "baselines" / baseline, f"{first} {BASELINE_TITLES[baseline]}"
        small = road.shape_of(pruned, "student.checkpoint")
        road.add(f"baseline-{baseline}", title, "train", with_baseline(base, baseline, small, pruned, target))
        road.evaluate(title, base, target)
    if recipe.run.prompts:
        lay_generation(base, road)


def lay_cache(base: Recipe, road: Road) -> Recipe:
    """The teacher's targets, written once; the recipe by which every student learns from them. Raises InputError for
    keys that do not go with it."""
    rules = {
        "run.chain": (base.run.chain, "lets each student teach the next"),
        "search": (searches(base), "distils its candidates beside the teacher"),
        "distill.teacher": (base.distill.teacher, "names targets that are there"),
    }
    for key, (value, rule) in rules.items():
        if value:
            shown = value if isinstance(value, bool | str) else None
            raise InputError(key, shown, f"{rule}, and run.cache=true makes its own", "leave one of the two out")
    targets = str(road.folder / "targets")
    road.add("cache", "cache the teacher's targets", "cache", with_keys(base, {"cache.folder": targets}))
    return with_keys(base, {"distill.teacher": f"{CACHE}{targets}"})


def lay_generation(base: Recipe, road: Road) -> None:
    """What teacher and students write, at the end. Others are written for other prompts, so the mark names them."""
    written = {"generate.output": str(road.folder / "continuations.jsonl"), "generate.prompt": None}
    told = {"checkpoints": road.finished, "checkpoint": None, "generate.prompts": None, **written}
    recipe, prompts = with_keys(base, told), tuple(base.run.prompts)
    settings = json.dumps([prompts, dataclasses.asdict(recipe.generate), [*road.finished]])
    mark = f"generate-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
    road.add(mark, "let teacher and students write", "generate", recipe, prompts=prompts, shows=False)


def lay_students(base: Recipe, teacher: Architecture, road: Road) -> tuple[str, Path]:
    """The students that the recipe names, cut and distilled; (name, pruned checkpoint) of the first."""
    students = base.run.students or {"student": base.student}
    if base.run.chain and len(students) == 1:
        rule = "cuts each student from the one before it, but the recipe has one student"
        raise InputError("run.chain", True, rule, "name two or more as run.students, or leave it out")
    if base.run.chain and base.distill.teacher:
        rule = f"lets each student teach the next, but distill.teacher={base.distill.teacher} teaches them all"
        raise InputError("run.chain", True, rule, "leave one of the two out")
    before = None
    for name, student in students.items():
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise InputError("run.students", name, "is to be a folder's name", "use letters, digits, dot, - and _")
        check_steps(base, student, f"run.students.{name}" if base.run.students else "student")
        own = road.folder / "students" / name
        if base.run.chain and before:
            source = road.folder / "students" / before / "distilled"
            told = {"teacher.checkpoint": str(source), "scores": str(own / "scores.safetensors"), "plan": None}
            base = with_keys(base, told)
            teacher = road.shape_of(source, "teacher.checkpoint")
            road.add(f"score-{name}", f"score {before}", "score", base)
        for step in parts_of(base, name, student, teacher, own):
            road.lay(step)
        lay_distillation(base, name, student, own / "pruned", own / "distilled", road)
        before = name
    first = next(iter(students))
    return first, road.folder / "students" / first / "pruned"


def lay_search(base: Recipe, road: Road) -> tuple[str, Path]:
    """The search, and the winner distilled on from where its trial ended; (its name, its pruned checkpoint).

    Which candidate wins is not known before: the largest stands for it, and `run` looks again after the search.
    Raises InputError for keys that do not go with a search.
    """
    if not base.search.train:
        remedy = "set search.train=true, or name a student as student.*"
        raise InputError("search.train", False, "leaves `run` without a student", remedy)
    if base.prune.steps != 1:
        rule = "prunes in steps, and a search cuts each of its candidates in one"
        raise InputError("prune.steps", base.prune.steps, rule, "leave it out")
    told = {"name": f"{base.name}-search", "output": str(road.folder / "search")}
    job = road.add("search", "search for the best student", "search", with_keys(base, told))
    pruned, distilled = winner_folders(road.folder / "search")
    if isinstance(job, SearchJob) and job.trials:
        if unfit := not_exported(job.trials.trials):
            rule = f"has candidates that could not be exported in the end, as {unfit[0]}"
            raise InputError("search", None, rule, "leave such sizes out")
        largest = max(job.trials.trials, key=lambda each: each.architecture.num_parameters)
        road.notes.append(
            f"which candidate is the best is known after the search: what follows is planned for the largest, "
            f"{largest.name}"
        )
        tokenizer = job.trials.teacher.tokenizer
        for made in (pruned, distilled):
            promised = Model("output", made, largest.architecture, tokenizer=tokenizer)
            road.promises = Promises(road.promises.models | {absolute(made): promised}, road.promises.items)
    if base.search.schedule == "search":
        # Its trial's schedule has ended: it is distilled anew.
        distilled = road.folder / "students" / "winner" / "distilled"
    lay_distillation(base, "winner", StudentConfig(), pruned, distilled, road)
    return "winner", pruned


def lay_distillation(
    base: Recipe, name: str, student: StudentConfig, pruned: Path, distilled: Path, road: Road
) -> None:
    """From a pruned student to its Hugging Face folder."""
    road.evaluate(f"{name} pruned", base, pruned)
    given = dataclasses.replace(student, checkpoint=str(pruned))
    trained = {"student": given, "distill.load": None, "distill.checkpoint": str(distilled)}
    if base.distill.correct_teacher:
        trained["correct.checkpoint"] = str(pruned.parent / "corrected")
    trained["name"] = f"{base.name}-{name}"
    road.add(f"distill-{name}", f"distil {name}", "distill", with_keys(base, trained))
    road.evaluate(f"{name} distilled", base, distilled)
    road.finished[f"{name} distilled"] = str(distilled)
    exported = with_keys(base, {"checkpoint": str(distilled), "hf": str(road.folder / "hf" / name)})
    road.add(f"export-{name}", f"export {name}", "export", exported, replaces=True)


def searches(recipe: Recipe) -> bool:
    """Whether the student is to be searched for: the recipe gives a grid, and names no student."""
    named = recipe.run.students or recipe.student.is_named
    return has_grid(recipe.search) and not named


def with_data(recipe: Recipe, road: Road) -> Recipe:
    """The recipe with a tokenizer and data, and the steps that make them where the recipe names none.

    Raises InputError where a teacher or tokens are given and their tokenizer is not.
    """
    if recipe.hf and not recipe.teacher.checkpoint and not recipe.tokenizer.model and has_tokenizer(Path(recipe.hf)):
        recipe = with_keys(recipe, {"tokenizer.model": recipe.hf})
    if not recipe.tokenizer.model:
        if recipe.teacher.checkpoint:
            given = find_checkpoint(recipe.teacher.checkpoint, "teacher.checkpoint")[0]
            beside = tokenizer_folder(given)
            remedy = "name it as tokenizer.model" + (f", as in tokenizer.model={beside}" if beside else "")
            raise InputError("teacher.checkpoint", given, "was trained with a tokenizer", remedy)
        if recipe.hf:
            remedy = "name the one that the model was trained with as tokenizer.model"
            raise InputError("hf", recipe.hf, "holds no tokenizer", remedy)
        if recipe.data.train is not None:
            remedy = "name the tokenizer's tokenizer.model too"
            raise InputError("data.train", recipe.data.train, "holds token ids", remedy)
        model = str(road.folder / "tokenizer" / "tokenizer.model")
        recipe = with_keys(recipe, {"tokenizer.model": model, "tokenizer.overwrite": True})
        road.add("tokenizer", "train the tokenizer", "tokenizer", recipe)
    if recipe.data.train is None:
        prefix, key = str(road.folder / "data" / "tokens"), recipe.preprocess.json_keys[0]
        recipe = with_keys(recipe, {"preprocess.output_prefix": prefix, "preprocess.overwrite": True})
        road.add("preprocess", "text to tokens", "preprocess", recipe)
        held_out = f"{prefix}_valid_{key}_document" if recipe.preprocess.valid_fraction > 0 else None
        valid = recipe.data.valid or held_out
        recipe = with_keys(recipe, {"data.train": f"{prefix}_{key}_document", "data.valid": valid})
    return recipe
