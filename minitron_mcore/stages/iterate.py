"""Pruning in steps, as `run` does it for prune.steps > 1: prune a little, score what is left, prune on.

students/NAME/step-1/pruned, distilled     cut from the teacher; trained in between, where prune.step_tokens says so
students/NAME/step-2/scores.safetensors    of what step 1 left
students/NAME/step-2/pruned, distilled     …
students/NAME/step-T/scores.safetensors
students/NAME/pruned                       the last step, the student

Source: arXiv 2407.14679, section 2.3 and table 14: steps without training between end where one shot does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError
from minitron_mcore.importance.config import TASK_METRICS, ImportanceConfig
from minitron_mcore.pruning.config import StudentConfig
from minitron_mcore.pruning.iterative import step_shapes
from minitron_mcore.pruning.plan import TARGETS, check_residual
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages import distill, prune, score
from minitron_mcore.stages.baseline import train_baseline
from minitron_mcore.stages.common import asked_shape, check_trained_model
from minitron_mcore.training.budget import check_train, plan_timetable
from minitron_mcore.training.learning_rate import check_learning_rate


@dataclass(frozen=True)
class Part:
    """One unit of a step: `name` for its mark, `title` for the console."""

    name: str
    title: str
    act: Callable[[], Any]


def shapes_of(recipe: Recipe, teacher: Architecture, student: StudentConfig) -> list[Architecture]:
    """The model after each step; raises InputError where the steps cannot be."""
    prune, parallel = recipe.prune, recipe.parallel
    divisors = {
        "num_layers": parallel.pipeline * parallel.virtual_pipeline if parallel.virtual_pipeline else 1,
        "hidden_size": prune.divisible_by,
        "ffn_hidden_size": math.lcm(prune.divisible_by, parallel.tensor),
        "num_query_groups": parallel.tensor,
    }
    return step_shapes(teacher, asked_shape(recipe, student, teacher), prune.steps, divisors)


def check_steps(recipe: Recipe, teacher: Architecture, students: dict[str, StudentConfig], data_parallel: int) -> None:
    """Raise InputError, naming the key, for steps that could not be walked."""
    config = recipe.prune
    for name, student in students.items():
        shapes = [teacher, *shapes_of(recipe, teacher, student)]
        if config.steps > 1 and student.layers is not None:
            where = f"run.students.{name}" if recipe.run.students else "student"
            raise InputError(
                f"{where}.layers={student.layers} names the teacher's layers, but prune.steps={config.steps} chooses "
                "again in every step: leave one of them out"
            )
        for before, after in pairwise(shapes):
            check_trained_model(after, recipe, "distill")
            check_residual(before, after, config.head_residual, config.residual_matrices)
    if config.steps > 1 and recipe.plan:
        raise InputError(f"plan={recipe.plan} is of one step, but prune.steps={config.steps}: leave one of them out")
    if config.step_tokens:
        training = dataclasses.replace(recipe.distill, tokens=config.step_tokens, phases=[])
        timetable = plan_timetable(training, recipe.data.sequence_length, "distill")
        check_train(training, recipe.parallel, data_parallel, timetable, "distill")
        check_learning_rate(training, timetable, "distill")


def parts_of(
    recipe: Recipe, runtime: Runtime, name: str, student: StudentConfig, teacher: Architecture, folder: Path
) -> list[Part]:
    """Everything from the teacher's scores to the student in `folder`/pruned, in order. `recipe` names the teacher's
    checkpoint and its scores."""
    shapes = shapes_of(recipe, teacher, student)
    parts: list[Part] = []
    before, source = teacher, Path(str(recipe.teacher.checkpoint))
    for number, shape in enumerate(shapes, start=1):
        is_last = number == len(shapes)
        where = folder if is_last else folder / f"step-{number}"
        words = name if len(shapes) == 1 else f"{name}, step {number} of {len(shapes)}"
        mark = name if is_last else f"{name}-step-{number}"
        pruning = _pruning(recipe, student if len(shapes) == 1 else sized(shape), source, where / "pruned")
        pruning = dataclasses.replace(pruning, name=f"{recipe.name}-{mark}")
        if own := _own_importance(recipe, number, before, shape):
            scores = str(folder / f"step-{number}" / "scores.safetensors")
            pruning = dataclasses.replace(pruning, importance=own, scores=scores)
            parts.append(Part(f"score-{name}-step-{number}", f"score {words}", partial(score.run, pruning, runtime)))
        parts.append(Part(f"prune-{mark}", f"prune {words}", partial(prune.run, pruning, runtime)))
        before, source = shape, where / "pruned"
        if recipe.prune.step_tokens and not is_last:
            trained = where / "distilled"
            parts.append(
                Part(f"train-{mark}", f"train {words}", _training(recipe, runtime, name, number, source, trained))
            )
            source = trained
    return parts


def sized(shape: Architecture) -> StudentConfig:
    """A shape in the recipe's words."""
    return StudentConfig(**{name: getattr(shape, name) for name in TARGETS})


def _pruning(recipe: Recipe, student: StudentConfig, source: Path, target: Path) -> Recipe:
    return dataclasses.replace(
        recipe,
        teacher=dataclasses.replace(recipe.teacher, checkpoint=str(source)),
        student=dataclasses.replace(student, checkpoint=str(target)),
        prune=dataclasses.replace(recipe.prune, overwrite=True, steps=1, step_tokens=0),
    )


def _own_importance(recipe: Recipe, number: int, before: Architecture, after: Architecture) -> ImportanceConfig | None:
    """What to score in step `number`; None where the teacher's scores serve, as in the first step they mostly do."""
    metric, removed = recipe.prune.depth_metric, before.num_layers - after.num_layers
    measured = metric != "block_influence" and removed > 0
    length = removed if recipe.prune.layers == "contiguous" and removed else 1
    if number == 1 and (recipe.prune.steps == 1 or not measured or length in recipe.importance.block_lengths):
        return None
    asks = recipe.importance.multiple_choice if measured and metric in TASK_METRICS else None
    return dataclasses.replace(
        recipe.importance,
        depth_metrics=[metric] if measured else [],
        block_lengths=[length],
        multiple_choice=asks,
    )


def _training(
    recipe: Recipe, runtime: Runtime, name: str, number: int, source: Path, target: Path
) -> Callable[[], Any]:
    """Between two steps: for prune.step_tokens with the schedule of `distill`, without its phases, from the original
    teacher, which stays as it is, or without."""
    distilling = dataclasses.replace(
        recipe.distill,
        tokens=recipe.prune.step_tokens,
        phases=[],
        load=None,
        checkpoint=str(target),
        correct_teacher=False,
    )
    shared = dataclasses.replace(recipe, name=f"{recipe.name}-{name}-step-{number}", distill=distilling)
    if recipe.prune.step_loss == "next_token":
        return partial(train_baseline, shared, runtime, "next_token", source, target)
    shared = dataclasses.replace(shared, student=StudentConfig(checkpoint=str(source)))
    return partial(distill.run, shared, runtime)
