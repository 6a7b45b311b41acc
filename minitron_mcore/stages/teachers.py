"""Who teaches in `distill`: a model beside the student, that model while it is itself corrected, or a cache.

Each is checked before anything is built, and loaded after.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import (
    find_checkpoint,
    iteration_folder,
    latest_iteration,
    read_architecture,
    read_lineage,
)
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.distillation.cache.teacher import CachedTeacher
from minitron_mcore.distillation.teacher.ahead import Teacher
from minitron_mcore.errors import InputError
from minitron_mcore.jobs.tokenizers import check_same_tokenizer, checkpoint_tokenizer, fit_tokenizer
from minitron_mcore.model.recompute import KEEP_ALL, check_recompute, recompute_of
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages.cache import identity
from minitron_mcore.stages.cached import lineage_of, open_cache
from minitron_mcore.stages.common import describe_trained, output_folder, refuse_other_run, teacher_layout
from minitron_mcore.training.budget import Timetable, plan_timetable
from minitron_mcore.training.learning_rate import check_learning_rate
from minitron_mcore.training.teaching import TrainedTeacher


@dataclass(frozen=True)
class Teaching:
    """A teacher that has been found fit for the student, and is yet to be loaded.

    architecture: of a model that runs beside the student; None: none does.
    compared: sections in which a run that is resumed must agree.
    samples: how many it was asked of, where it is cached.
    """

    words: str
    tokenizer: Tokenizer
    architecture: Architecture | None
    compared: tuple[str, ...]
    lineage: dict[str, Any]
    load: Callable[[Timetable], Teacher | CachedTeacher]
    samples: int = 0


def model_teaching(recipe: Recipe, runtime: Runtime, student: Architecture, student_folder: Path, key: str) -> Teaching:
    """`teacher.checkpoint`, under its own layout, placement and precision if asked; every rank calls.

    key: where the recipe names `student_folder`. Raises InputError where the two do not belong together.
    """
    folder, newest = find_checkpoint(recipe.teacher.checkpoint, "teacher.checkpoint")
    iteration = runtime.on_main(lambda: taught_so_far(recipe.distill.checkpoint, folder, newest))
    if iteration != newest:
        runtime.print(
            f"distill: goes on with iteration {iteration} of teacher.checkpoint={folder}, as it began, where {newest} "
            "is the newest now"
        )
    tokenizer, architecture = checkpoint_tokenizer(recipe, folder), read_architecture(folder)
    check_vocabulary(architecture, student)
    tokenizer = fit_tokenizer(tokenizer, student, recipe)
    check_same_tokenizer(tokenizer, student_folder, key)
    layout = teacher_layout(recipe, architecture, runtime.world_size)
    compared: tuple[str, ...] = ("data", "distill", "teacher")
    corrected: Path | None = None
    if recipe.distill.correct_teacher:
        corrected, compared = corrected_folder(recipe, folder), (*compared, "correct")
        check_recompute(recipe.correct, architecture, recipe.parallel, "correct")

    def load(timetable: Timetable) -> Teacher:
        teacher = Teacher.load(
            folder,
            iteration,
            architecture,
            recipe.parallel,
            recipe.teacher.precision or recipe.precision,
            layout=layout,
            placement=recipe.teacher.placement,
            recompute=KEEP_ALL if corrected is None else recompute_of(recipe.correct),
        )
        if corrected is None:
            return teacher
        describe = corrected_description(recipe, tokenizer, architecture, folder, corrected)
        return TrainedTeacher(teacher, recipe.correct, timetable, recipe.precision, corrected, describe)

    words = f"teacher {architecture.num_parameters:,}" + (f", corrected into {corrected}," if corrected else "")
    lineage = {"checkpoint": str(folder), **identity(folder, iteration)}
    if corrected:
        lineage["corrected"] = str(corrected)
    return Teaching(words, tokenizer, architecture, compared, lineage, load)


def taught_so_far(student: str | None, teacher: Path, newest: int) -> int:
    """The teacher's iteration that the run in the folder `student` was distilled from so far; `newest` for a new run.
    Any rank calls. Raises InputError where that is not there any more, or not as it was."""
    if student is None or latest_iteration(Path(student)) is None:
        return newest
    lineage = read_lineage(Path(student))
    before = lineage.get("teacher", {})
    if lineage.get("stage") != "distill" or "targets" in before or "iteration" not in before:
        return newest
    iteration = int(before["iteration"])
    wrong = None
    if not iteration_folder(teacher, iteration).is_dir():
        wrong = f"which is not there any more (the newest is {newest})"
    elif before.get("weights") not in (None, identity(teacher, iteration)["weights"]):
        wrong = "which has other weights now"
    if wrong:
        raise InputError(
            f"distill.checkpoint={student} was distilled from iteration {iteration} of teacher.checkpoint={teacher} so "
            f"far, {wrong}: restore it, or name another distill.checkpoint"
        )
    return iteration


def cache_teaching(
    recipe: Recipe, runtime: Runtime, cache: Path, student: Architecture, student_folder: Path
) -> Teaching:
    """The targets in `cache`; no teacher is read. Every rank calls. Raises InputError where they do not serve."""
    tokenizer = checkpoint_tokenizer(recipe, student_folder)
    teacher = open_cache(recipe, runtime, cache, tokenizer, student)
    lineage = {"cache": str(cache), **lineage_of(teacher)}
    samples = teacher.reader.settings["num_samples"]
    return Teaching(str(cache), tokenizer, None, ("data", "distill"), lineage, lambda timetable: teacher, samples)


def check_teacher_keys(recipe: Recipe) -> None:
    """Raise InputError for keys about the teacher that do not go together. Any rank calls."""
    window, parallel = recipe.distill.teacher_window, recipe.parallel
    if window < 0 or (parallel.virtual_pipeline and window % parallel.pipeline):
        raise InputError(
            f"distill.teacher_window={window} must be 0, for the whole global batch, or a number of microbatches"
            + (f", of which the interleaved schedule takes multiples of {parallel.pipeline}" if window > 0 else "")
        )
    if not recipe.distill.correct_teacher:
        return
    refused = {
        f"teacher.placement={recipe.teacher.placement}": recipe.teacher.placement != "resident",
        "teacher.parallel": recipe.teacher.parallel not in (None, parallel),
        f"teacher.precision={recipe.teacher.precision}": recipe.teacher.precision not in (None, recipe.precision),
        f"distill.teacher_window={window}": window != 0,
        f"distill.teacher={recipe.distill.teacher}": recipe.distill.teacher is not None,
        f"correct.tokens={recipe.correct.tokens}": recipe.correct.tokens != 0,
        f"correct.load={recipe.correct.load}": recipe.correct.load is not None,
        "correct.phases": recipe.correct.phases != [],
        f"correct.rampup_batch_size={recipe.correct.rampup_batch_size}": recipe.correct.rampup_batch_size is not None,
    }
    for setting, is_given in refused.items():
        if is_given:
            raise InputError(
                f"{setting} does not go with distill.correct_teacher=true, which trains the teacher beside the student "
                "in its layout and for its tokens: leave one of the two out"
            )
    timetable = plan_timetable(recipe.distill, recipe.data.sequence_length, "distill")
    correct = dataclasses.replace(recipe.correct, tokens=recipe.distill.tokens)
    check_learning_rate(correct, timetable, "correct", budget="distill")


def corrected_folder(recipe: Recipe, teacher_folder: Path) -> Path:
    """Where a teacher that is corrected as it teaches is kept. Raises InputError for a folder that cannot be it."""
    folder = output_folder(recipe.correct.checkpoint, "correct.checkpoint")
    if folder.resolve() == teacher_folder.resolve():
        raise InputError(f"correct.checkpoint={folder} is teacher.checkpoint's own folder: name another")
    if recipe.distill.checkpoint and folder.resolve() == Path(recipe.distill.checkpoint).resolve():
        raise InputError(f"correct.checkpoint={folder} is distill.checkpoint's own folder: name another")
    # Its learning rate follows the budget of `distill`.
    sections = ("data", "teacher", "correct", "distill")
    refuse_other_run(folder, recipe, sections, "correct.checkpoint", "correct", keeps_budget=True)
    student = Path(recipe.distill.checkpoint or "")
    stands_at = latest_iteration(student)
    was_corrected = "corrected" in read_lineage(student).get("teacher", {})
    if stands_at is not None and was_corrected and not iteration_folder(folder, stands_at).is_dir():
        raise InputError(
            f"correct.checkpoint={folder} has no iteration {stands_at}, at which distill.checkpoint={student} stands: "
            "name the folder that this run's teacher was saved to"
        )
    return folder


def corrected_description(
    recipe: Recipe, tokenizer: Tokenizer, architecture: Architecture, source: Path, folder: Path
) -> Callable[[int], None]:
    """What writes the corrected teacher's description beside its weights, after some number of tokens."""

    def describe(tokens: int) -> None:
        lineage = {"stage": "correct", "load": str(source), "lineage": read_lineage(source)}
        describe_trained(folder, recipe, architecture, tokenizer, source, lineage, tokens)

    return describe


def check_vocabulary(teacher: Architecture, student: Architecture) -> None:
    """Raise InputError where the two output distributions are not over the same ids, or the teacher is the smaller."""
    for field in ("vocab_size", "padded_vocab_size"):
        ours, theirs = getattr(student, field), getattr(teacher, field)
        if ours != theirs:
            raise InputError(
                f"{field} is {ours} in student.checkpoint and {theirs} in teacher.checkpoint: a student is distilled "
                "from a teacher of the same vocabulary"
            )
    if student.num_parameters > teacher.num_parameters:
        raise InputError(
            f"student.checkpoint has {student.num_parameters:,} parameters and teacher.checkpoint "
            f"{teacher.num_parameters:,}: the teacher is the larger one; swap the two"
        )
