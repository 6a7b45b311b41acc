"""`run`: the whole recipe, step by step; every step is resolved before the first one acts. Pure.

output/tokenizer/tokenizer.model          (unless the recipe names one)
output/data/tokens_text_document.*        (unless the recipe names data)
output/teacher/                           trained to train.tokens (of a teacher that the recipe names: results.json)
output/corrected/                         where correct.tokens is given: what is scored, pruned and taught from
output/scores.safetensors                 one scoring pass for all students
output/students/NAME/pruned, distilled    one for each of run.students (step-1 … beside them: jobs/iterate.py)
output/baselines/next_token, random       of the first student's shape, on the same tokens
output/hf/NAME                            every distilled student as a Hugging Face folder
output/results.json                       held-out losses of all of them
output/done/STEP.json                     what a finished step gave
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_mcore.checkpoint.folder import find_checkpoint, tokenizer_folder
from minitron_mcore.errors import InputError
from minitron_mcore.jobs.continuation import refuse_other_run
from minitron_mcore.jobs.inputs import find_model, output_folder, require
from minitron_mcore.jobs.iterate import check_steps, parts_of
from minitron_mcore.jobs.job import NOTHING, Job, Promises
from minitron_mcore.jobs.layouts import refuse_context
from minitron_mcore.jobs.step import Step, with_baseline
from minitron_mcore.pruning.config import StudentConfig
from minitron_mcore.recipe import Recipe, with_keys
from minitron_mcore.runtime.config import check_layout
from minitron_mcore.runtime.world import World

SECTIONS = (
    "input",
    "tokenizer",
    "preprocess",
    "data",
    "model",
    "teacher",
    "student",
    "importance",
    "prune",
    "train",
    "correct",
    "distill",
    "evaluate",
    "run",
)
EVALUATE = "evaluate "
Told = dict[str, Any]
BASELINE_TITLES = {"next_token": "next-token loss", "random": "random weights"}


@dataclass(frozen=True, kw_only=True)
class RunJob(Job):
    """`steps` in order, into `folder`. jobs: what each will do; None: it is done."""

    folder: Path
    world: World
    steps: tuple[Step, ...]
    jobs: tuple[Job | None, ...]


@dataclass
class _Road:
    """Steps are resolved as they are laid, each with what those before it promise."""

    folder: Path
    world: World
    promises: Promises
    steps: list[Step] = field(default_factory=list)
    jobs: list[Job | None] = field(default_factory=list)

    def lay(self, step: Step) -> None:
        job = None
        if not step.mark(self.folder).is_file():
            job = step.resolve(self.world, self.promises)
            self.promises = self.promises.after(job)
        self.steps.append(step)
        self.jobs.append(job)

    def add(self, name: str, title: str, verb: str, recipe: Recipe, told: Told | None = None, **options: Any) -> None:
        """A step of the recipe with other values at the keys `told`."""
        self.lay(Step(name, title, verb, with_keys(recipe, told or {}), options))

    def evaluate(self, name: str, recipe: Recipe, checkpoint: Path | str, results: Path | None = None) -> None:
        told = {"checkpoint": str(checkpoint), "results": str(results) if results else None}
        self.add(EVALUATE + name, f"evaluate {name}", "evaluate", recipe, told)


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING) -> RunJob:
    """Every step of the recipe; the same command goes on where it was cut off. Raises InputError."""
    require(recipe, {"output": "the folder of the run"})
    folder = output_folder(recipe.output, "output")
    check_layout(recipe.parallel, world.size)
    if recipe.importance.method == "activation":
        refuse_context(recipe, "run")
    refuse_other_run(folder, recipe, SECTIONS, "output")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "recipe.yaml").is_file():
        raise InputError("output", folder, "holds something other than a run", "name another folder")
    refuse_lost_tokenizer(recipe)
    road = _Road(folder, world, promises)
    lay_road(recipe, road)
    return RunJob(
        recipe=recipe,
        makes=tuple(made for job in road.jobs if job for made in job.makes),
        folder=folder,
        world=world,
        steps=tuple(road.steps),
        jobs=tuple(road.jobs),
    )


def lay_road(recipe: Recipe, road: _Road) -> None:
    """All steps in order, with the recipe that each gets."""
    folder = road.folder
    base = with_data(recipe, road)
    teacher = recipe.teacher.checkpoint or str(folder / "teacher")
    scores = recipe.scores or str(folder / "scores.safetensors")
    base = with_keys(base, {"teacher.checkpoint": teacher, "scores": scores})
    if not recipe.teacher.checkpoint:
        told = {"name": f"{recipe.name}-teacher", "train.checkpoint": teacher}
        road.add("train-teacher", "train the teacher", "train", base, told)
    shape = find_model(teacher, "teacher.checkpoint", road.promises).architecture
    # Nothing is written into the folder of a teacher that the recipe names.
    results = folder / "teacher" / "results.json" if recipe.teacher.checkpoint else None
    road.evaluate("teacher", base, teacher, results)
    if recipe.correct.tokens:
        corrected = str(folder / "corrected")
        told = {"name": f"{recipe.name}-corrected", "correct.checkpoint": corrected}
        road.add("correct-teacher", "correct the teacher", "correct", base, told)
        road.evaluate("corrected teacher", base, corrected)
        base = with_keys(base, {"teacher.checkpoint": corrected})
    road.add("score", "score the teacher", "score", base)
    students = recipe.run.students or {"student": recipe.student}
    for name, student in students.items():
        if not re.fullmatch(r"\w[\w.-]*", name):
            remedy = "use letters, digits, dot, - and _"
            raise InputError("run.students", name, "is to be a folder's name", remedy)
        check_steps(recipe, student, f"run.students.{name}" if recipe.run.students else "student")
        pruned, distilled = folder / "students" / name / "pruned", folder / "students" / name / "distilled"
        for step in parts_of(base, name, student, shape, pruned.parent):
            road.lay(step)
        road.evaluate(f"{name} pruned", base, pruned)
        told = distillation(recipe, student, pruned, distilled)
        road.add(f"distill-{name}", f"distil {name}", "distill", base, told)
        road.evaluate(f"{name} distilled", base, distilled)
        told = {"checkpoint": str(distilled), "hf": str(folder / "hf" / name)}
        road.add(f"export-{name}", f"export {name}", "export", base, told, replaces=True)
    first = next(iter(students))
    pruned = folder / "students" / first / "pruned"
    for baseline in recipe.run.baselines:
        target, title = folder / "baselines" / baseline, f"{first} {BASELINE_TITLES[baseline]}"
        small = find_model(pruned, "student.checkpoint", road.promises).architecture
        training = with_baseline(base, baseline, small, pruned, target)
        road.add(f"baseline-{baseline}", title, "train", training)
        road.evaluate(title, base, target)


def distillation(recipe: Recipe, student: StudentConfig, pruned: Path, distilled: Path) -> Told:
    """The keys of the recipe by which `student` is distilled."""
    told = {
        "name": f"{recipe.name}-{pruned.parent.name}",
        "student": student,
        "student.checkpoint": str(pruned),
        "distill.load": None,
        "distill.checkpoint": str(distilled),
    }
    corrected = str(pruned.parent / "corrected")
    return {**told, "correct.checkpoint": corrected} if recipe.distill.correct_teacher else told


def with_data(recipe: Recipe, road: _Road) -> Recipe:
    """The recipe with a tokenizer and data, and the steps that make them where the recipe names none."""
    if not recipe.tokenizer.model:
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


def refuse_lost_tokenizer(recipe: Recipe) -> None:
    """Raise InputError where a teacher or tokens are given and their tokenizer is not."""
    if recipe.tokenizer.model:
        return
    if recipe.teacher.checkpoint:
        given = find_checkpoint(recipe.teacher.checkpoint, "teacher.checkpoint")[0]
        beside = tokenizer_folder(given)
        remedy = "name it as tokenizer.model" + (f", as in tokenizer.model={beside}" if beside else "")
        raise InputError("teacher.checkpoint", given, "was trained with a tokenizer", remedy)
    if recipe.data.train is not None:
        remedy = "name the tokenizer's tokenizer.model too"
        raise InputError("data.train", recipe.data.train, "holds token ids", remedy)
