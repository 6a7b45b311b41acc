"""`distill`: train the pruned student from its teacher, for a token budget (arXiv 2407.14679, section 3). Pure."""

from __future__ import annotations

from dataclasses import dataclass

from minitron_mcore.distillation.cache.serving import cache_folder
from minitron_mcore.distillation.states.map import check_hidden_states
from minitron_mcore.errors import InputError
from minitron_mcore.jobs.inputs import budget_and_text, find_model, require
from minitron_mcore.jobs.job import NOTHING, Item, Model, Promises, absolute
from minitron_mcore.jobs.teachers import Teaching, cache_teaching, check_teacher_keys, model_teaching
from minitron_mcore.jobs.training import TrainingJob, resolve_training
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.world import World


@dataclass(frozen=True, kw_only=True)
class DistillJob(TrainingJob):
    """A training whose loss is of a teacher too. `source` is the pruned student."""

    teaching: Teaching


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING) -> DistillJob:
    """A distillation to `distill.tokens`; the same command goes on where it was cut off. Raises InputError.

    `distill.load` (by default `student.checkpoint`) is the pruned student, `distill.checkpoint` where it is trained.
    """
    distill = recipe.distill
    key = "distill.load" if distill.load else "student.checkpoint"
    cache = cache_folder(distill.teacher)
    needed = {key: "the folder of the pruned student", "distill.checkpoint": "the folder to write to"}
    needed |= {} if cache else {"teacher.checkpoint": "the folder of the teacher"}
    require(recipe, needed, budget_and_text("distill"))
    check_teacher_keys(recipe)
    student = find_model(distill.load or recipe.student.checkpoint, key, promises)
    refuse_own_folder(recipe, student)
    if cache is not None:
        teaching = cache_teaching(recipe, cache, promises, student)
    else:
        teaching = model_teaching(recipe, world, promises, student)
        assert teaching.model is not None
        check_hidden_states(distill.hidden_states, student.architecture, teaching.model.architecture, recipe.parallel)
    if distill.top_k > (size := student.architecture.vocab_size):
        raise InputError("distill.top_k", distill.top_k, f"is more than the student's vocab_size={size}", "lower it")
    teacher = teaching.model or Item("distill.teacher", str(cache), f"{teaching.samples:,} samples' targets")
    makes: tuple[Model, ...] = ()
    if teaching.corrected and teaching.model:
        makes = (Model("correct.checkpoint", teaching.corrected, teaching.model.architecture),)
    return resolve_training(
        DistillJob,
        recipe,
        world,
        promises,
        section="distill",
        source=student,
        architecture=student.architecture,
        tokenizer=teaching.tokenizer,
        compared=teaching.compared,
        lineage={
            "stage": "distill",
            "student": {"checkpoint": str(student.folder), **student.lineage},
            "teacher": teaching.lineage,
        },
        teacher=teaching.architecture,
        least_samples=teaching.samples,
        beside=(teacher,),
        makes=makes,
        notes=teaching.notes,
        teaching=teaching,
    )


def refuse_own_folder(recipe: Recipe, student: Model) -> None:
    """Raise InputError where the output folder is the student's or the teacher's."""
    folder = str(recipe.distill.checkpoint)
    read = [str(student.folder), *([recipe.teacher.checkpoint] if recipe.teacher.checkpoint else [])]
    if absolute(folder) in [absolute(each) for each in read]:
        raise InputError("distill.checkpoint", folder, "is the student's or the teacher's own folder", "name another")
