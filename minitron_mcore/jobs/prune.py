"""`prune`: a plan, or scores and a shape, applied to the teacher's sharded checkpoint. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError
from minitron_mcore.jobs.inputs import find_model, output_folder, require, sizes_of, value_at
from minitron_mcore.jobs.job import NOTHING, PLAN, SCORES, Item, Model, ModelJob, Promises, absolute
from minitron_mcore.jobs.plan import NEEDED, plan_from_scores, promised_shape, read_scores
from minitron_mcore.layout import check_tensor_parallel, split_layers
from minitron_mcore.pruning.plan import scores_fingerprint
from minitron_mcore.pruning.plan_file import PruningPlan, load_plan
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.config import ParallelConfig, check_layout
from minitron_mcore.runtime.world import World


@dataclass(frozen=True, kw_only=True)
class PruneJob(ModelJob):
    """The student that `plan` cuts out of the teacher, to the new folder `target`. plan: None if it is promised, or its
    scores are."""

    plan: PruningPlan | None


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING) -> PruneJob:
    """`teacher.checkpoint` and `plan`, or `scores` and `student.*` -> the folder `student.checkpoint`.

    Raises InputError, also if plan, scores and `student.*` disagree.
    """
    needed = {"teacher.checkpoint": "the teacher's folder", "student.checkpoint": "the folder to write the student to"}
    require(recipe, needed if recipe.plan else needed | NEEDED)
    check_layout(recipe.parallel, world.size)
    teacher = find_model(recipe.teacher.checkpoint, "teacher.checkpoint", promises)
    student, plan = find_plan(recipe, teacher.architecture, promises)
    check_tensor_parallel(student, recipe.parallel.tensor)
    split_layers(student.num_layers, recipe.parallel.pipeline)
    target = student_folder(recipe, teacher.folder)
    notes = pipeline_split(student.num_layers, recipe.parallel)
    if plan is not None and teacher.iteration is not None:
        notes += other_teacher(plan, teacher.place)
    made_from = Item("plan", recipe.plan, PLAN) if recipe.plan else Item("scores", str(recipe.scores), SCORES)
    makes = (Model("student.checkpoint", target, student, 0, tokenizer=teacher.tokenizer),)
    return PruneJob(recipe, (teacher, made_from), makes, tuple(notes), model=teacher, target=target, plan=plan)


def find_plan(recipe: Recipe, teacher: Architecture, promises: Promises) -> tuple[Architecture, PruningPlan | None]:
    """The student's shape, and the plan in the file `plan`, else that of `scores` and `student.*`.

    None if an earlier job will make the plan or the scores. Raises InputError if plan or scores are of another model,
    or disagree with each other or with `student.*`.
    """
    if not recipe.plan:
        return plan_from_scores(recipe, teacher, promises)
    if absolute(recipe.plan) in promises.items:
        return promised_shape(recipe, teacher), None
    plan = load_plan(recipe.plan, teacher)
    # What it was made with, and what stands for a key that is left out.
    planned: dict[str, tuple[Any, Any]] = {
        **{f"student.{name}": (size, None) for name, size in sizes_of(plan.student).items()},
        "student.layers": (plan.layers, None),
        "student.ratios": (plan.settings.get("ratios"), {}),
        "prune.head_residual": (plan.residual.rule if plan.residual else "none", "none"),
    }
    for key, (there, left_out) in planned.items():
        if (asked := value_at(recipe, key)) not in (there, left_out):
            why = f"is not what plan={recipe.plan} was made with, {there or 'none'}"
            raise InputError(key, asked, why, f"plan again, or leave {key} out")
    made_from = plan.settings.get("scores_fingerprint")
    compares = recipe.scores and made_from and absolute(recipe.scores) not in promises.items
    if compares and scores_fingerprint(read_scores(recipe, teacher)) != made_from:
        why = f"was made from other scores than scores={recipe.scores}"
        raise InputError("plan", recipe.plan, why, "plan again, or leave scores out")
    return plan.student, plan


def pipeline_split(num_layers: int, parallel: ParallelConfig) -> list[str]:
    """How the student's layers lie over the stages, if unevenly; what is written fits any layout."""
    if num_layers < (chunks := parallel.pipeline * (parallel.virtual_pipeline or 1)):
        return [
            f"{num_layers} layers are fewer than the {chunks} stages of parallel.pipeline={parallel.pipeline} x "
            f"parallel.virtual_pipeline={parallel.virtual_pipeline}: train this student with fewer"
        ]
    stages = split_layers(num_layers, parallel.pipeline, parallel.virtual_pipeline)
    counts = [[str(len(layers)) for layers in stage] for stage in stages]
    if len({count for stage in counts for count in stage}) == 1:
        return []
    return [f"layers on each pipeline stage: {', '.join(' + '.join(stage) for stage in counts)}"]


def other_teacher(plan: PruningPlan, source: tuple[Path, int]) -> list[str]:
    """A warning if the plan's scores are of other weights of the same architecture; none if the plan does not say."""
    scored = plan.settings.get("scores", {}).get("teacher")
    if not scored or (Path(scored["checkpoint"]).resolve(), scored["iteration"]) == (source[0].resolve(), source[1]):
        return []
    return [
        f"the scores are of iteration {scored['iteration']} of {scored['checkpoint']}, but iteration {source[1]} of "
        f"{source[0]} is pruned"
    ]


def student_folder(recipe: Recipe, teacher: Path) -> Path:
    """Where the student goes. Raises InputError if that would mix it with, or overwrite, something else."""
    key, other = "student.checkpoint", "name another folder"
    target = output_folder(recipe.student.checkpoint, key).resolve()
    if teacher.resolve().is_relative_to(target) or target.is_relative_to(teacher.resolve()):
        raise InputError(key, target, "is the teacher's own folder, or one lies within the other", other)
    if target.is_dir() and any(target.iterdir()):
        if not recipe.prune.overwrite:
            raise InputError(key, target, "exists already", f"{other}, or set prune.overwrite=true")
        if not (target / "architecture.yaml").is_file():
            rule = "holds something other than a checkpoint, which prune.overwrite=true does not delete"
            raise InputError(key, target, rule, other)
    return target
