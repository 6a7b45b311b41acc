"""Who teaches in `distill`: a model beside the student, that model while it is itself corrected, or a cache. Pure."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import iteration_folder, latest_iteration, read_lineage
from minitron_mcore.checkpoint.identity import identity
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.jobs.cached import check_cache_serves, lineage_of
from minitron_mcore.jobs.continuation import refuse_other_run
from minitron_mcore.jobs.inputs import find_model, output_folder
from minitron_mcore.jobs.job import Model, Promises, absolute
from minitron_mcore.jobs.layouts import teacher_layout
from minitron_mcore.jobs.tokenizers import check_same_tokenizer, fit_tokenizer, model_tokenizer
from minitron_mcore.model.recompute import check_recompute
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.runtime.world import World
from minitron_mcore.training.budget import plan_timetable
from minitron_mcore.training.learning_rate import check_learning_rate


@dataclass(frozen=True)
class Teaching:
    """A teacher that is fit for the student.

    model: the one that runs beside the student, at the iteration that the run began with; None: none does.
    layout: how it lies over the ranks.
    corrected: where a model that is trained while it teaches is kept.
    cache: the folder of its targets; samples: how many it was asked for.
    compared: the sections in which a run that goes on must agree.
    """

    tokenizer: Tokenizer | None
    compared: tuple[str, ...]
    lineage: dict[str, Any]
    model: Model | None = None
    layout: ParallelConfig | None = None
    corrected: Path | None = None
    cache: Path | None = None
    samples: int = 0
    notes: tuple[str, ...] = ()

    @property
    def architecture(self) -> Architecture | None:
        return self.model.architecture if self.model else None

    def __str__(self) -> str:
        if self.model is None:
            return str(self.cache)
        corrected = f", corrected into {self.corrected}," if self.corrected else ""
        return f"teacher {self.model.architecture.num_parameters:,}{corrected}"


def model_teaching(recipe: Recipe, world: World, promises: Promises, student: Model) -> Teaching:
    """`teacher.checkpoint`, under its own layout, placement and precision if asked.

    Raises InputError where it and `student` do not belong together.
    """
    model = find_model(recipe.teacher.checkpoint, "teacher.checkpoint", promises)
    notes = []
    if model.iteration is not None:
        began = taught_so_far(recipe.distill.checkpoint, model)
        if began != model.iteration:
            notes.append(
                f"goes on with iteration {began} of teacher.checkpoint={model.folder}, with which it began; the newest "
                f"is {model.iteration}"
            )
            model = dataclasses.replace(model, iteration=began)
    check_vocabulary(model.architecture, student.architecture)
    tokenizer = model_tokenizer(recipe, model, promises)
    if tokenizer is not None:
        tokenizer = fit_tokenizer(tokenizer, student.architecture, recipe)
        if student.iteration is not None:
            check_same_tokenizer(tokenizer, student.folder, student.key)
    layout = teacher_layout(recipe, model, world)
    compared: tuple[str, ...] = ("data", "distill", "teacher")
    lineage: dict[str, Any] = {"checkpoint": str(model.folder)}
    if model.iteration is not None:
        lineage |= identity(model.folder, model.iteration)
    corrected = None
    if recipe.distill.correct_teacher:
        corrected, compared = corrected_folder(recipe, model.folder), (*compared, "correct")
        lineage["corrected"] = str(corrected)
        check_recompute(recipe.correct, model.architecture, recipe.parallel, "correct")
    if model.iteration is not None and is_itself(model, student):
        notes.append(
            f"{student.key}={student.folder} and teacher.checkpoint are iteration {model.iteration} of the same "
            "checkpoint: the student starts as its teacher, at a divergence of 0 that training can only raise"
        )
    return Teaching(tokenizer, compared, lineage, model, layout, corrected, notes=tuple(notes))


def is_itself(teacher: Model, student: Model) -> bool:
    return (absolute(teacher.folder), teacher.iteration) == (absolute(student.folder), student.iteration)


def taught_so_far(student: str | None, teacher: Model) -> int:
    """The teacher's iteration that the run in the folder `student` was distilled from so far; its newest for a new run.

    Raises InputError where that is not there any more, or has changed.
    """
    assert teacher.iteration is not None
    if student is None or latest_iteration(Path(student)) is None:
        return teacher.iteration
    lineage = read_lineage(Path(student))
    before = lineage.get("teacher", {})
    if lineage.get("stage") != "distill" or "targets" in before or "iteration" not in before:
        return teacher.iteration
    iteration = int(before["iteration"])
    wrong = None
    if not iteration_folder(teacher.folder, iteration).is_dir():
        wrong = f"is not in teacher.checkpoint={teacher.folder}, where the newest is {teacher.iteration}"
    elif before.get("weights") not in (None, identity(teacher.folder, iteration)["weights"]):
        wrong = f"has other weights in teacher.checkpoint={teacher.folder}"
    if wrong:
        rule = f"was distilled so far from iteration {iteration} of its teacher, which {wrong}"
        raise InputError("distill.checkpoint", student, rule, "name or restore that teacher, or name another folder")
    return iteration


def cache_teaching(recipe: Recipe, cache: Path, promises: Promises, student: Model) -> Teaching:
    """The targets in `cache`; no teacher is read. Raises InputError where they do not serve."""
    tokenizer = model_tokenizer(recipe, student, promises)
    settings = check_cache_serves(recipe, cache, tokenizer, student.architecture)
    lineage = {"cache": str(cache), **lineage_of(settings)}
    return Teaching(tokenizer, ("data", "distill"), lineage, cache=cache, samples=settings["num_samples"])


def check_teacher_keys(recipe: Recipe) -> None:
    """Raise InputError for keys about the teacher that do not go together."""
    window, parallel = recipe.distill.teacher_window, recipe.parallel
    if parallel.virtual_pipeline and window % parallel.pipeline:
        multiples = f"of which the interleaved schedule takes multiples of {parallel.pipeline}"
        rule = f"must be 0, for the whole global batch, or a number of microbatches, {multiples}"
        raise InputError("distill.teacher_window", window, rule)
    if not recipe.distill.correct_teacher:
        return
    correct, teacher = recipe.correct, recipe.teacher
    refused = {
        "teacher.placement": (teacher.placement, teacher.placement != "resident"),
        "teacher.parallel": (None, teacher.parallel not in (None, parallel)),
        "teacher.precision": (teacher.precision, teacher.precision not in (None, recipe.precision)),
        "distill.teacher_window": (window, window != 0),
        "distill.teacher": (recipe.distill.teacher, recipe.distill.teacher is not None),
        "correct.tokens": (correct.tokens, correct.tokens != 0),
        "correct.load": (correct.load, correct.load is not None),
        "correct.phases": (None, correct.phases != []),
        "correct.rampup_batch_size": (correct.rampup_batch_size, correct.rampup_batch_size is not None),
    }
    for key, (value, is_given) in refused.items():
        if is_given:
            rule = (
                "does not go with distill.correct_teacher=true, which trains the teacher beside the student in its "
                "layout and for its tokens"
            )
            raise InputError(key, value, rule, "leave one of the two out")
    timetable = plan_timetable(recipe.distill, recipe.data.sequence_length, "distill")
    check_learning_rate(
        dataclasses.replace(correct, tokens=recipe.distill.tokens), timetable, "correct", budget="distill"
    )


def corrected_folder(recipe: Recipe, teacher_folder: Path) -> Path:
    """Where a teacher that is corrected as it teaches is kept. Raises InputError for a folder that cannot be it."""
    key = "correct.checkpoint"
    folder = output_folder(recipe.correct.checkpoint, key)
    if absolute(folder) == absolute(teacher_folder):
        raise InputError(key, folder, "is teacher.checkpoint's own folder", "name another")
    if recipe.distill.checkpoint and absolute(folder) == absolute(recipe.distill.checkpoint):
        raise InputError(key, folder, "is distill.checkpoint's own folder", "name another")
    # Its learning rate follows the budget of `distill`.
    sections = ("data", "teacher", "correct", "distill")
    refuse_other_run(folder, recipe, sections, key, "correct", keeps_budget=True)
    student = Path(recipe.distill.checkpoint or "")
    stands_at = latest_iteration(student)
    was_corrected = "corrected" in read_lineage(student).get("teacher", {})
    if stands_at is not None and was_corrected and not iteration_folder(folder, stands_at).is_dir():
        rule = f"has no iteration {stands_at}, at which distill.checkpoint={student} stands"
        raise InputError(key, folder, rule, "name the folder that this run's teacher was saved to")
    return folder


def check_vocabulary(teacher: Architecture, student: Architecture) -> None:
    """Raise InputError where the two output distributions are not over the same ids, or the teacher is the smaller."""
    for field in ("vocab_size", "padded_vocab_size"):
        ours, theirs = getattr(student, field), getattr(teacher, field)
        if ours != theirs:
            rule = f"is {ours} in student.checkpoint and {theirs} in teacher.checkpoint"
            raise InputError(field, None, rule, "a student is distilled from a teacher of the same vocabulary")
    if student.num_parameters > teacher.num_parameters:
        rule = f"has {student.num_parameters:,} parameters and teacher.checkpoint {teacher.num_parameters:,}"
        raise InputError("student.checkpoint", None, rule, "the teacher is the larger one; swap the two")
