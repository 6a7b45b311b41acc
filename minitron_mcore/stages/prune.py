"""Verb `prune`: a plan applied to the teacher's sharded checkpoint, which makes the student's."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from minitron_mcore.checkpoint.companions import carry_companions
from minitron_mcore.checkpoint.folder import tokenizer_folder, write_description
from minitron_mcore.files import writing
from minitron_mcore.jobs.job import Model
from minitron_mcore.jobs.prune import PruneJob
from minitron_mcore.pruning.apply import prune_checkpoint
from minitron_mcore.pruning.plan_file import PruningPlan, save_plan
from minitron_mcore.recipe import Recipe, to_yaml
from minitron_mcore.runtime.parallel import use_layout
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.runtime.whole_folder import whole_folder
from minitron_mcore.stages.plan import describe


def run(job: PruneJob, runtime: Runtime) -> Path:
    """Write `job.target`, iteration 0, and return it; it has a hidden name beside that until it is whole."""
    recipe, source, target, plan = job.recipe, job.model.place, job.target, job.plan
    assert plan is not None, "the plan is promised: resolve the job again before it acts"
    use_layout(recipe.parallel, runtime.world_size)
    runtime.barrier()  # every rank has looked at the folder before the first one changes it
    runtime.print(describe(plan))
    called = f"student.checkpoint={target}"

    def finish(unfinished: Path) -> None:
        tokenizer = tokenizer_folder(source[0])
        with writing(called):
            write_description(
                unfinished,
                plan.student,
                lineage=lineage(recipe, job.model, plan),
                recipe=to_yaml(recipe),
                save_tokenizer=partial(shutil.copytree, tokenizer) if tokenizer else None,
            )
            carry_companions(source[0], unfinished)
            save_plan(plan, unfinished / "plan.json")

    with whole_folder(target, called) as unfinished:
        prune_checkpoint(source, plan, unfinished, runtime, called=called)
        runtime.on_main(partial(finish, unfinished))
    runtime.print(f"prune: {plan.teacher.num_parameters:,} -> {plan.student.num_parameters:,} parameters -> {target}")
    return target


def lineage(recipe: Recipe, model: Model, plan: PruningPlan) -> dict[str, Any]:
    """Where the student that `plan` cuts out of the teacher `model` comes from; fingerprints are sha256."""
    (folder, iteration), teacher = model.place, dict(model.lineage)
    return {
        "stage": "prune",
        "teacher": {"checkpoint": str(folder), "iteration": iteration, "lineage": teacher},
        "plan": {"file": recipe.plan, "fingerprint": plan.fingerprint},
        "scores": {"file": recipe.scores, "fingerprint": plan.settings.get("scores_fingerprint")},
        "tokens": 0,
        "tokenizer": teacher.get("tokenizer"),
    }
