"""`prune`: a plan applied to the teacher's sharded checkpoint -> the student's."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.companions import carry_companions
from minitron_mcore.checkpoint.folder import (
    find_checkpoint,
    read_architecture,
    read_lineage,
    tokenizer_folder,
    write_description,
)
from minitron_mcore.errors import InputError
from minitron_mcore.files import writing
from minitron_mcore.layout import check_tensor_parallel, split_layers
from minitron_mcore.pruning.apply import prune_checkpoint
from minitron_mcore.pruning.plan import TARGETS, PruningPlan, load_plan, save_plan, scores_fingerprint
from minitron_mcore.recipe import Recipe, to_yaml
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.runtime.parallel import use_layout
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.runtime.whole_folder import whole_folder
from minitron_mcore.stages.common import output_folder
from minitron_mcore.stages.plan import describe, plan_from_scores, read_scores


def run(recipe: Recipe, runtime: Runtime) -> Path:
    """Write `student.checkpoint`, iteration 0, and return it. Under a hidden name beside it until it is whole."""
    use_layout(recipe.parallel, runtime.world_size)
    source = find_checkpoint(recipe.teacher.checkpoint, "teacher.checkpoint")
    plan = read_plan(recipe, read_architecture(source[0]))
    check_tensor_parallel(plan.student, recipe.parallel.tensor)
    split_layers(plan.student.num_layers, recipe.parallel.pipeline)
    target = student_folder(recipe, source[0])
    runtime.barrier()  # every rank has looked at the folder before the first one changes it

    runtime.print(describe(plan))
    for warning in other_teacher(plan, source):
        runtime.print(warning)
    for line in pipeline_split(plan.student.num_layers, recipe.parallel):
        runtime.print(line)
    called = f"student.checkpoint={target}"

    def finish(unfinished: Path) -> None:
        tokenizer = tokenizer_folder(source[0])
        with writing(called):
            write_description(
                unfinished,
                plan.student,
                lineage=lineage(recipe, source, plan),
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


def read_plan(recipe: Recipe, teacher: Architecture) -> PruningPlan:
    """The plan in the file `plan` where given, else that of `scores` and `student.*`.

    Raises InputError where the plan or the scores are of another model, or disagree with each other or `student.*`.
    """
    if not recipe.plan:
        return plan_from_scores(recipe, teacher)
    plan = load_plan(recipe.plan, teacher)
    for name in TARGETS:
        asked, planned = getattr(recipe.student, name), getattr(plan.student, name)
        if asked is not None and asked != planned:
            raise InputError(
                f"student.{name}={asked}, but plan={recipe.plan} is for {planned}: plan again, or leave "
                f"student.{name} out"
            )
    if recipe.student.layers is not None and recipe.student.layers != plan.layers:
        raise InputError(
            f"student.layers={recipe.student.layers}, but plan={recipe.plan} keeps {plan.layers}: plan again, or leave "
            "student.layers out"
        )
    if recipe.student.ratios and recipe.student.ratios != plan.settings.get("ratios"):
        raise InputError(
            f"student.ratios={recipe.student.ratios}, but plan={recipe.plan} was made with "
            f"{plan.settings.get('ratios') or 'none'}: plan again, or leave student.ratios out"
        )
    asked, planned = recipe.prune.head_residual, plan.residual.rule if plan.residual else "none"
    if asked not in ("none", planned):
        raise InputError(
            f"prune.head_residual={asked}, but plan={recipe.plan} was made with {planned}: plan again, or leave "
            "prune.head_residual out"
        )
    made_from = plan.settings.get("scores_fingerprint")
    if recipe.scores and made_from and scores_fingerprint(read_scores(recipe, teacher)) != made_from:
        raise InputError(
            f"plan={recipe.plan} was made from other scores than scores={recipe.scores}: plan again, or "
            "leave scores out"
        )
    return plan


def pipeline_split(num_layers: int, parallel: ParallelConfig) -> list[str]:
    """How the student's layers lie over the stages, where they do not lie evenly; what is written fits any layout."""
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
    """A warning where the plan's scores are of other weights of the same architecture; none where they say nothing."""
    scored = plan.settings.get("scores", {}).get("teacher")
    if not scored or (Path(scored["checkpoint"]).resolve(), scored["iteration"]) == (source[0].resolve(), source[1]):
        return []
    return [
        f"warning: the scores are of iteration {scored['iteration']} of {scored['checkpoint']}, but iteration "
        f"{source[1]} of {source[0]} is pruned"
    ]


def student_folder(recipe: Recipe, teacher: Path) -> Path:
    """Where the student goes. Raises InputError where that would mix it with, or overwrite, something else."""
    target = output_folder(recipe.student.checkpoint, "student.checkpoint").resolve()
    if teacher.resolve().is_relative_to(target) or target.is_relative_to(teacher.resolve()):
        raise InputError(
            f"student.checkpoint={target} is the teacher's own folder, or one within the other: name another folder"
        )
    if target.is_dir() and any(target.iterdir()):
        if not recipe.prune.overwrite:
            raise InputError(
                f"student.checkpoint={target} is there already: name another folder, or set prune.overwrite=true"
            )
        if not (target / "architecture.yaml").is_file():
            raise InputError(
                f"student.checkpoint={target} holds something other than a checkpoint, which "
                "prune.overwrite=true does not delete: name another folder"
            )
    return target


def lineage(recipe: Recipe, source: tuple[Path, int], plan: PruningPlan) -> dict[str, Any]:
    """What the student comes from; fingerprints are sha256."""
    teacher = read_lineage(source[0])
    return {
        "stage": "prune",
        "teacher": {"checkpoint": str(source[0]), "iteration": source[1], "lineage": teacher},
        "plan": {"file": recipe.plan, "fingerprint": plan.fingerprint},
        "scores": {"file": recipe.scores, "fingerprint": plan.settings.get("scores_fingerprint")},
        "tokens": 0,
        "tokenizer": teacher.get("tokenizer"),
    }
