"""`correct`: fine-tune the teacher on the distillation's own data before it teaches (arXiv 2408.11796, section 4).

A teacher guides a student worse on data that it was not trained on; the correction lowers the student's loss by more
than 6% there. To correct it while the student is distilled, in one job, see `distill.correct_teacher`.
"""

from __future__ import annotations

from minitron_mcore.errors import InputError
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages.train import train_section
from minitron_mcore.training.config import CorrectConfig
from minitron_mcore.training.job import Progress


def run(recipe: Recipe, runtime: Runtime) -> Progress:
    """Train `teacher.checkpoint` onward to `correct.tokens`, into `correct.checkpoint`; the same command goes on."""
    check_load(recipe.correct)
    if recipe.teacher.checkpoint is None:
        raise InputError("teacher.checkpoint is not given: name the folder of the teacher to correct")
    teacher = (recipe.teacher.checkpoint, "teacher.checkpoint")
    return train_section(recipe, runtime, "correct", teacher, ("data", "correct", "teacher"))


def check_load(correct: CorrectConfig) -> None:
    """Raise InputError where `correct.load` is given."""
    if correct.load is not None:
        raise InputError(
            f"correct.load={correct.load} is not read: what is corrected is teacher.checkpoint; leave it out"
        )
