"""Pruning in steps, as `run` does it for prune.steps > 1: prune a little, score what is left, prune on. Pure.

students/NAME/step-1/pruned, distilled     cut from the teacher; trained in between, where prune.step_tokens says so
students/NAME/step-2/scores.safetensors    of what step 1 left
students/NAME/step-2/pruned, distilled     …
students/NAME/step-T/scores.safetensors
students/NAME/pruned                       the last step, the student

Source: arXiv 2407.14679, section 2.3 and table 14: steps without training between end where one shot does.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError
from minitron_mcore.files import first_line
from minitron_mcore.importance.config import TASK_METRICS, ImportanceConfig
from minitron_mcore.jobs.inputs import asked_shape, sizes_of
from minitron_mcore.jobs.job import Job, Promises, resolve
from minitron_mcore.model.config import ModelConfig
from minitron_mcore.pruning.config import StudentConfig
from minitron_mcore.pruning.targets import step_shapes
from minitron_mcore.recipe import Recipe, with_keys
from minitron_mcore.runtime.world import World
from minitron_mcore.training.config import TrainConfig


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


def check_steps(recipe: Recipe, student: StudentConfig, section: str) -> None:
    """Raise InputError for keys that do not go with the number of steps. section: where the recipe has `student`."""
    steps, remedy = recipe.prune.steps, "leave one of them out"
    if steps == 1:
        return
    if student.layers is not None:
        rule = f"names the teacher's layers, but prune.steps={steps} chooses again in every step"
        raise InputError(f"{section}.layers", student.layers, rule, remedy)
    if recipe.plan:
        raise InputError("plan", recipe.plan, f"is of one step, but prune.steps={steps}", remedy)


def parts_of(recipe: Recipe, name: str, student: StudentConfig, teacher: Architecture, folder: Path) -> Iterator[Step]:
    """Everything from the teacher's scores to the student in `folder`/pruned, in order. `recipe` names the teacher's
    checkpoint and its scores."""
    shapes = shapes_of(recipe, teacher, student)
    before, source = teacher, Path(str(recipe.teacher.checkpoint))
    for number, shape in enumerate(shapes, start=1):
        is_last = number == len(shapes)
        where = folder if is_last else folder / f"step-{number}"
        words = name if len(shapes) == 1 else f"{name}, step {number} of {len(shapes)}"
        mark = name if is_last else f"{name}-step-{number}"
        told: dict[str, Any] = {
            "name": f"{recipe.name}-{mark}",
            "teacher.checkpoint": str(source),
            "student": student if len(shapes) == 1 else StudentConfig(**sizes_of(shape)),
            "student.checkpoint": str(where / "pruned"),
            "prune.overwrite": True,
            "prune.steps": 1,
            "prune.step_tokens": 0,
        }
        if own := _own_importance(recipe, number, before, shape):
            scores = str(folder / f"step-{number}" / "scores.safetensors")
            told |= {"importance": own, "scores": scores}
            yield Step(f"score-{name}-step-{number}", f"score {words}", "score", with_keys(recipe, told))
        yield Step(f"prune-{mark}", f"prune {words}", "prune", with_keys(recipe, told))
        before, source = shape, where / "pruned"
        if recipe.prune.step_tokens and not is_last:
            trained = where / "distilled"
            yield _training(recipe, name, number, words, shape, source, trained)
            source = trained


def _own_importance(recipe: Recipe, number: int, before: Architecture, after: Architecture) -> ImportanceConfig | None:
    """What to score in step `number`; None where the teacher's scores serve, as in the first step they mostly do."""
    metric, removed = recipe.prune.depth_metric, before.num_layers - after.num_layers
    measured = metric != "block_influence" and removed > 0
    length = removed if recipe.prune.layers == "contiguous" and removed else 1
    if number == 1 and (recipe.prune.steps == 1 or not measured or length in recipe.importance.block_lengths):
        return None
    asks = recipe.importance.multiple_choice if measured and metric in TASK_METRICS else None
    metrics = [metric] if measured else []
    return dataclasses.replace(recipe.importance, depth_metrics=metrics, block_lengths=[length], multiple_choice=asks)


def _training(
    recipe: Recipe, name: str, number: int, words: str, shape: Architecture, source: Path, target: Path
) -> Step:
    """Between two steps: for prune.step_tokens with the schedule of `distill`, without its phases, from the original
    teacher, which stays as it is, or without."""
    told = {
        "name": f"{recipe.name}-{name}-step-{number}",
        "distill.tokens": recipe.prune.step_tokens,
        "distill.phases": [],
        "distill.load": None,
        "distill.checkpoint": str(target),
        "distill.correct_teacher": False,
        "student": StudentConfig(checkpoint=str(source)),
    }
    verb, trained = "distill", with_keys(recipe, told)
    if recipe.prune.step_loss == "next_token":
        verb, trained = "train", with_baseline(trained, "next_token", shape, source, target)
    return Step(f"train-{name}-step-{number}", f"train {words}", verb, trained)


@dataclass(frozen=True)
class Step:
    """One job of a run, skipped once it is done. name: of its mark in done/; title: for the console."""

    name: str
    title: str
    verb: str
    recipe: Recipe
    options: Mapping[str, Any] = field(default_factory=dict)  # of the verb's `resolve`

    @property
    def word(self) -> str:
        """The name as run.only and cluster.stages have it."""
        return self.name.replace(" ", "-")

    def mark(self, folder: Path) -> Path:
        """The file that says that it is done, and what it gave."""
        return folder / "done" / f"{self.word}.json"

    def outcome(self, folder: Path) -> Any:
        """What it gave; None where it is not done. Raises InputError where its mark is damaged."""
        done = self.mark(folder)
        if not done.is_file():
            return None
        try:
            return json.loads(done.read_text(encoding="utf-8"))
        except ValueError as error:
            rule = f"does not say what the step gave ({first_line(error)})"
            raise InputError("output", done, rule, "delete it: the step is done again") from error

    def resolve(self, world: World, promises: Promises) -> Job:
        return resolve(self.verb, self.recipe, world, promises, **self.options)


def with_baseline(recipe: Recipe, baseline: str, shape: Architecture, pruned: Path, target: Path) -> Recipe:
    """Next-token training of a student's shape with the distillation's own budget and schedule, from the pruned weights
    (next_token) or random ones: what distillation is compared with, and what may stand between pruning steps."""
    shared = {entry.name: getattr(recipe.distill, entry.name) for entry in dataclasses.fields(TrainConfig)}
    shared |= {"checkpoint": str(target), "load": str(pruned) if baseline == "next_token" else None}
    stored = shape.to_dict()
    fields = {entry.name: stored[entry.name] for entry in dataclasses.fields(ModelConfig) if entry.name in stored}
    # The student's own padding, whatever multiple the recipe names.
    fields["make_vocab_size_divisible_by"] = stored["padded_vocab_size"]
    name = f"{recipe.name}-{baseline}"
    return dataclasses.replace(recipe, name=name, train=TrainConfig(**shared), model=ModelConfig(**fields))
