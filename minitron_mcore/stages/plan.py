"""`plan`: scores + the student's shape -> plan.json, without touching weights."""

from __future__ import annotations

from pathlib import Path

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import find_checkpoint, read_architecture
from minitron_mcore.data.corpus import check_file
from minitron_mcore.errors import InputError
from minitron_mcore.importance.scores import Scores, load_scores
from minitron_mcore.pruning.plan import TARGETS, PruningPlan, check_same_model, make_plan, save_plan
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.start import Runtime


def run(recipe: Recipe, runtime: Runtime) -> PruningPlan:
    """Write `plan` and print what the student is; the same plan on every rank."""
    if not recipe.plan:
        raise InputError("plan is not given: name the file to write, as in plan=plan.json")
    check_file(recipe.plan, "plan")
    teacher = None
    if recipe.teacher.checkpoint:
        teacher = read_architecture(find_checkpoint(recipe.teacher.checkpoint, "teacher.checkpoint")[0])
    plan = plan_from_scores(recipe, teacher)
    target = Path(recipe.plan)
    if target.exists() and target.read_text(encoding="utf-8") != plan.to_json() and not recipe.prune.overwrite:
        raise InputError(f"plan={target} holds another plan: name another file, or set prune.overwrite=true")
    runtime.barrier()
    if runtime.is_main:
        save_plan(plan, target)
    runtime.print(describe(plan))
    runtime.print(f"plan: written to {recipe.plan}")
    runtime.barrier()
    return plan


def plan_from_scores(recipe: Recipe, teacher: Architecture | None) -> PruningPlan:
    """The plan of `scores` and `student.*`. Raises InputError where the scores are of another model than `teacher`."""
    prune, student = recipe.prune, recipe.student
    if prune.steps != 1:
        raise InputError(
            f"prune.steps={prune.steps} scores between its steps, which only `run` does: leave prune.steps out here"
        )
    return make_plan(
        read_scores(recipe, teacher),
        {name: getattr(student, name) for name in TARGETS},
        layers=prune.layers,
        tensor=recipe.parallel.tensor,
        pipeline=recipe.parallel.pipeline,
        sequence_length=recipe.data.sequence_length,
        keep_layers=student.layers,
        ratios=student.ratios,
        divisible_by=prune.divisible_by,
        variant=prune.variant,
        depth_metric=prune.depth_metric,
        head_residual=prune.head_residual,
        residual_matrices=prune.residual_matrices,
    )


def read_scores(recipe: Recipe, teacher: Architecture | None) -> Scores:
    scores = load_scores(recipe.scores)
    if teacher is not None:
        check_same_model(scores.architecture, teacher, f"scores={recipe.scores} are of")
    return scores


def describe(plan: PruningPlan) -> str:
    """Before, after, and the narrowest cut of every axis, as a table; then the warnings."""
    axes = dict(zip(TARGETS, ("layers", "hidden", "ffn", "heads", "groups"), strict=True))
    rows = [("", "teacher", "student", "kept", "margin at the cut")]
    for name, axis in axes.items():
        before, after = getattr(plan.teacher, name), getattr(plan.student, name)
        cut = plan.cuts.get(axis)
        margin = "" if cut is None or cut.margin is None else f"{cut.margin:.1e}"
        if margin and cut is not None and cut.layer is not None:
            margin += f" (layer {cut.layer})"
        rows.append((name, f"{before:,}", f"{after:,}", f"{after / before:.0%}", margin))
    cost = plan.cost()
    for name, before in cost["teacher"].items():
        after = cost["student"][name]
        rows.append((name.replace("_", " "), f"{before:,}", f"{after:,}", f"{after / before:.1%}", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)), row[4]]).rstrip()
        for row in rows
    ]
    if (residual := plan.residual) is not None:
        count = sum(len(pairs) for pairs in residual.pairs.values())
        lines.append(f"head residuals ({residual.rule}): {count} heads, in {', '.join(residual.matrices)}")
    return "\n".join([*lines, *(f"warning: {warning}" for warning in plan.warnings)])
