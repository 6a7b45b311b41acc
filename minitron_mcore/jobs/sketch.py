"""The steps of a recipe with the shapes they are of, without any of its files: what `estimate` looks at. Pure."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.distillation.cache.serving import cache_folder
from minitron_mcore.jobs.distill import check_vocabulary
from minitron_mcore.jobs.inputs import asked_shape, sizes_of, value_at
from minitron_mcore.jobs.iterate import Step
from minitron_mcore.jobs.job import Model, Promises, absolute
from minitron_mcore.jobs.run import Road, lay_road, searches
from minitron_mcore.jobs.search import candidates_of, winner_folders
from minitron_mcore.jobs.shape import shape_at
from minitron_mcore.jobs.train import new_architecture
from minitron_mcore.pruning.config import StudentConfig
from minitron_mcore.pruning.plan_file import load_plan
from minitron_mcore.pruning.targets import no_target
from minitron_mcore.recipe import Recipe, with_keys
from minitron_mcore.runtime.world import World
from minitron_mcore.search.halving import trial_tokens
from minitron_mcore.tables import counted

TRAININGS = ("train", "correct", "distill")
TEACHER = "train-teacher"  # the name of its step
GOES_ON = "all are tried, and the winner's trial counts as the first part of its distillation (search.schedule=distill)"


@dataclass(frozen=True)
class Work:
    """A step, and the shapes of its models.

    model: what is trained, read or, by `prune`, made. teacher: what it is taught by or cut from; None: by or from none.
    side_by_side: so many of it run at a time, each on its share of the ranks. note: what its title does not say.
    """

    step: Step
    model: Architecture
    teacher: Architecture | None = None
    side_by_side: int = 1
    note: str = ""

    @property
    def verb(self) -> str:
        return self.step.verb

    @property
    def recipe(self) -> Recipe:
        return self.step.recipe


def sketch_road(recipe: Recipe, teacher: Architecture) -> Sketch:
    """What `run` would do by the recipe, of a teacher of this shape (`works`), and the models that are made on the way.
    Trainings without a budget are left out, and where no student is said all that would be done with one. Raises
    InputError where a shape cannot be.
    """
    folder = Path(recipe.output or "run")
    # A tokenizer and tokens are there or will be; their steps need no GPU.
    told: dict[str, Any] = {
        "tokenizer.model": recipe.tokenizer.model or "tokenizer.model",
        "data.train": recipe.data.train or "tokens",
    }
    promises = Promises()
    if recipe.teacher.checkpoint or recipe.hf:
        told["teacher.checkpoint"] = recipe.teacher.checkpoint or str(folder / "teacher")
        promises.models[absolute(told["teacher.checkpoint"])] = Model("teacher.checkpoint", folder, teacher)
    if searched := searches(recipe):
        told["search.train"] = True  # as it would be, where the recipe only lists
    elif not recipe.run.students and not recipe.student.is_named:
        told["student"] = given_student(recipe, teacher)
    recipe = with_keys(recipe, told)
    is_pruned = searched or bool(recipe.run.students) or recipe.student.is_named
    road = Sketch(folder, World(), promises, teacher=teacher, is_pruned=is_pruned)
    lay_road(recipe, road)
    return road


def given_student(recipe: Recipe, teacher: Architecture) -> StudentConfig:
    """The shape of a student that is there, pruned already or planned; as the recipe says where none is.

    Raises InputError where a distillation has a student no smaller than its teacher.
    """
    key = "distill.load" if recipe.distill.load else "student.checkpoint"
    folder = value_at(recipe, key)
    if folder and Path(folder).is_dir() and any(Path(folder).iterdir()):
        shape = shape_at(folder, key, recipe)
        check_vocabulary(teacher, shape)
    elif recipe.plan and Path(recipe.plan).is_file():
        shape = load_plan(recipe.plan, teacher).student
    elif recipe.distill.tokens:
        raise no_target(teacher)
    else:
        return recipe.student
    return StudentConfig(**sizes_of(shape))


@dataclass
class Sketch(Road):
    """Lays steps without resolving them, and promises the shapes that they make."""

    teacher: Architecture = field(kw_only=True)
    is_pruned: bool = field(kw_only=True)  # whether the recipe says a student
    works: list[Work] = field(default_factory=list)
    is_over: bool = False  # what is left is of a student that is none

    def lay(self, step: Step) -> None:
        if step.verb == "search":
            self._lay_trials(step)
            return
        work, makes = self._work(step)
        if makes:
            key, folder = makes
            self.promises.models[absolute(folder)] = Model(key, Path(folder), work.model)
        self.is_over = self.is_over or (step.verb == "prune" and not self.is_pruned)
        if not self.is_over and (step.verb not in TRAININGS or getattr(step.recipe, step.verb).tokens):
            self.works.append(work)

    def _lay_trials(self, step: Step) -> None:
        """The trials of a search as one distillation of its largest candidate, which stands for the others and for the
        winner. Where the winner's own trial is the beginning of its distillation, it is not counted twice."""
        recipe, source = step.recipe, self._shape(step.recipe, "teacher.checkpoint")
        candidates = candidates_of(recipe, source)
        largest = max((each.architecture for each in candidates), key=lambda shape: shape.num_parameters)
        for made in winner_folders(Path(str(recipe.output))):
            self.promises.models[absolute(made)] = Model("output", made, largest)
        count, every = len(candidates), counted(len(candidates), "candidate")
        title, note = f"try {every} as large", ""
        if recipe.search.schedule == "distill":
            count -= 1
            title, note = f"try {count:,} of {every} as large", GOES_ON
        subsets = recipe.search.side_by_side
        title += f", {subsets} side by side" if subsets > 1 else ""
        if tokens := -(-count // subsets) * trial_tokens(recipe.search, len(candidates)):
            distill = dataclasses.replace(recipe.distill, tokens=tokens, phases=[])
            trials = Step(step.name, title, "distill", dataclasses.replace(recipe, distill=distill))
            self.works.append(Work(trials, largest, source, subsets, note))

    def _work(self, step: Step) -> tuple[Work, tuple[str, str] | None]:
        """The step's shapes, and the key and folder of the model that it makes, if any."""
        recipe, verb = step.recipe, step.verb
        if verb == "train":
            shape = self.teacher if step.name == TEACHER else new_architecture(recipe, None, self.promises)
            return Work(step, shape), ("train.checkpoint", str(recipe.train.checkpoint))
        source = self._shape(recipe, "checkpoint" if verb in ("evaluate", "export") else "teacher.checkpoint")
        if verb == "correct":
            return Work(step, source), ("correct.checkpoint", str(recipe.correct.checkpoint))
        if verb == "prune":
            made = asked_shape(recipe, recipe.student, source)
            return Work(step, made, source), ("student.checkpoint", str(recipe.student.checkpoint))
        if verb == "distill":
            student = self._shape(recipe, "student.checkpoint")
            teacher = None if cache_folder(recipe.distill.teacher) else source
            return Work(step, student, teacher), ("distill.checkpoint", str(recipe.distill.checkpoint))
        return Work(step, source), None

    def _shape(self, recipe: Recipe, key: str) -> Architecture:
        return self.promises.models[absolute(value_at(recipe, key))].architecture
