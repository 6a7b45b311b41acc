"""`plan`: scores and the student's shape to plan.json, without touching weights. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minitron_mcore.architecture import Architecture
from minitron_mcore.data.corpus import check_file
from minitron_mcore.errors import InputError
from minitron_mcore.importance.config import variant_names
from minitron_mcore.importance.scores import Scores, load_scores
from minitron_mcore.jobs.inputs import asked_shape, find_model, require
from minitron_mcore.jobs.job import NOTHING, PLAN, SCORES, Item, Job, Promises, absolute
from minitron_mcore.pruning.config import PruneConfig, StudentConfig
from minitron_mcore.pruning.plan import make_plan
from minitron_mcore.pruning.plan_file import PruningPlan, check_residual, check_same_model
from minitron_mcore.pruning.targets import no_target
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.world import World
from minitron_mcore.tables import counted

NEEDED = {"scores": "the file that `minitron score` wrote"}


@dataclass(frozen=True, kw_only=True)
class PlanJob(Job):
    """`plan` to the file `target`. plan: None if an earlier job will make the scores."""

    target: Path
    plan: PruningPlan | None


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING) -> PlanJob:
    """`scores` and `student.*` -> the file `plan`. Raises InputError."""
    require(recipe, {"plan": "the file to write, as in plan=plan.json", **NEEDED})
    check_file(str(recipe.plan), "plan")
    given = recipe.teacher.checkpoint or absolute(str(recipe.scores)) in promises.items
    model = find_model(recipe.teacher.checkpoint, "teacher.checkpoint", promises) if given else None
    teacher = model.architecture if model else read_scores(recipe).architecture
    student, plan = plan_from_scores(recipe, teacher, promises)
    if student == teacher:
        raise no_target(teacher)
    target = Path(str(recipe.plan))
    stands = target.exists() and not recipe.prune.overwrite
    if stands and plan and target.read_text(encoding="utf-8", errors="replace") != plan.to_json():
        raise InputError("plan", target, "holds another plan", "name another file, or set prune.overwrite=true")
    scores, made = Item("scores", str(recipe.scores), SCORES), Item("plan", str(target), PLAN)
    return PlanJob(recipe, (model, scores) if model else (scores,), (made,), target=target, plan=plan)


def plan_from_scores(
    recipe: Recipe, teacher: Architecture, promises: Promises
) -> tuple[Architecture, PruningPlan | None]:
    """The student's shape, and the plan of `scores` and `student.*`; None if the scores are promised.

    Raises InputError, also if the scores are of another model than `teacher`.
    """
    prune = recipe.prune
    if prune.steps != 1:
        rule, remedy = "scores between its steps, which only `run` does", "leave prune.steps out here"
        raise InputError("prune.steps", prune.steps, rule, remedy)
    if absolute(str(recipe.scores)) in promises.items:
        return promised_shape(recipe, teacher), None
    plan = plan_at(recipe, read_scores(recipe, teacher), recipe.student, prune)
    return plan.student, plan


def plan_at(recipe: Recipe, scores: Scores, student: StudentConfig, prune: PruneConfig) -> PruningPlan:
    """The plan of `student` and `prune` for the recipe's layout and sequences. Raises InputError."""
    return make_plan(scores, student, prune, recipe.parallel, recipe.data.sequence_length)


def promised_shape(recipe: Recipe, teacher: Architecture) -> Architecture:
    """The shape of a student whose scores or plan are not there yet. Raises InputError."""
    prune, importance = recipe.prune, recipe.importance
    shape = asked_shape(recipe, recipe.student, teacher)
    check_residual(teacher, shape, prune.head_residual, prune.residual_matrices)
    metric, removed = prune.depth_metric, teacher.num_layers - shape.num_layers
    length = removed if prune.layers == "contiguous" else 1
    is_measured = metric in importance.depth_metrics and length in importance.block_lengths
    if metric != "block_influence" and removed and recipe.student.layers is None and not is_measured:
        remedy = f"add {metric} to importance.depth_metrics and {length} to importance.block_lengths"
        raise InputError(
            "prune.depth_metric", metric, f"is not measured for blocks of {counted(length, 'layer')}", remedy
        )
    if prune.variant and prune.variant not in (names := variant_names(importance)):
        remedy = "add it by importance.aggregations and importance.neuron_sites"
        raise InputError("prune.variant", prune.variant, f"is not among what is scored ({', '.join(names)})", remedy)
    return shape


def read_scores(recipe: Recipe, teacher: Architecture | None = None) -> Scores:
    """Raises InputError if `scores` cannot be read, or are of another model than `teacher`."""
    scores = load_scores(recipe.scores)
    if teacher is not None:
        check_same_model(scores.architecture, teacher, "scores", recipe.scores)
    return scores
