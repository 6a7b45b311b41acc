"""Verb `plan`: scores and the student's shape to plan.json, without touching weights."""

from __future__ import annotations

from minitron_mcore.jobs.plan import PlanJob
from minitron_mcore.pruning.plan_file import SIZES, PruningPlan, save_plan
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.tables import table


def run(job: PlanJob, runtime: Runtime) -> PruningPlan:
    """Write `job.target` and print what the student is; the same plan on every rank."""
    plan = job.plan
    assert plan is not None, f"{job.recipe.scores} is promised: resolve the job again before it acts"
    runtime.barrier()  # every rank has looked at the file before the first one changes it
    if runtime.is_main:
        save_plan(plan, job.target)
    runtime.print(describe(plan))
    runtime.print(f"plan: written to {job.target}")
    runtime.barrier()
    return plan


def describe(plan: PruningPlan) -> str:
    """Before, after, and the narrowest cut of every axis, as a table; then the warnings."""
    rows = []
    for axis, name in SIZES.items():
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
    lines = [table(rows, ("", "teacher", "student", "kept", "margin at the cut"), left={0, 4})]
    if (residual := plan.residual) is not None:
        count = sum(len(pairs) for pairs in residual.pairs.values())
        lines.append(f"head residuals ({residual.rule}): {count} heads, in {', '.join(residual.matrices)}")
    return "\n".join([*lines, *(f"WARNING: {warning}" for warning in plan.warnings)])
