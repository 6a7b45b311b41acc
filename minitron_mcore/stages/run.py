"""`run`: the whole recipe, step by step, in one process group: skips what is done, resumes what was cut off.

output/tokenizer/tokenizer.model          (unless the recipe names one)
output/data/tokens_text_document.*        (unless the recipe names data)
output/teacher/                           trained to train.tokens (of a teacher that the recipe names: results.json)
output/corrected/                         where correct.tokens is given: what is scored, pruned and taught from
output/scores.safetensors                 one scoring pass for all students
output/students/NAME/pruned, distilled    one for each of run.students (step-1 … beside them: stages/iterate.py)
output/baselines/next_token, random       of the first student's shape, on the same tokens
output/hf/NAME                            every distilled student as a Hugging Face folder
output/results.json                       held-out losses of all of them
output/done/STEP.json                     what a finished step gave
"""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minitron_mcore.data.tokenizer import load_tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.files import write_whole
from minitron_mcore.jobs.export import resolve as resolve_export
from minitron_mcore.pruning.config import StudentConfig
from minitron_mcore.recipe import Recipe, to_yaml
from minitron_mcore.runtime.interrupt import exit_code, name_of
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.runtime.world import World
from minitron_mcore.stages import correct, distill, evaluate, export, iterate, preprocess, score, tokenizer, train
from minitron_mcore.stages.baseline import train_baseline
from minitron_mcore.stages.checks import check_road, teacher_architecture
from minitron_mcore.stages.common import lay_out, output_folder, refuse_other_run
from minitron_mcore.stages.table import closing_table
from minitron_mcore.training.job import Progress

SECTIONS = (
    "input",
    "tokenizer",
    "preprocess",
    "data",
    "model",
    "teacher",
    "student",
    "importance",
    "prune",
    "train",
    "correct",
    "distill",
    "evaluate",
    "run",
)


EVALUATE = "evaluate "


@dataclass(frozen=True)
class Step:
    """One unit that is skipped once done. `act` returns what is kept of it (plain data), on every rank."""

    name: str
    title: str
    act: Callable[[], Any]


def run(recipe: Recipe, runtime: Runtime) -> dict[str, Any]:
    """Walk the road; returns the held-out results by model. The same command goes on where it was cut off."""
    folder = output_folder(recipe.output, "output")
    lay_out(recipe, runtime)
    refuse_other_run(folder, recipe, SECTIONS, "output")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "recipe.yaml").is_file():
        raise InputError(f"output={folder} holds something other than a run: name another folder")
    road = plan_road(recipe, runtime, folder)
    runtime.barrier()
    if runtime.is_main:
        (folder / "done").mkdir(parents=True, exist_ok=True)
        write_whole(folder / "recipe.yaml", to_yaml(recipe))
    runtime.barrier()

    started = time.perf_counter()
    results: dict[str, Any] = {}
    for number, step in enumerate(road, start=1):
        results[step.name] = do(step, f"[{number}/{len(road)}]", folder, runtime)
    losses = {name.removeprefix(EVALUATE): value for name, value in results.items() if name.startswith(EVALUATE)}
    if runtime.is_main:
        _write(folder / "results.json", losses)
    runtime.print(f"\n{closing_table(losses)}\n\nrun: done in {time.perf_counter() - started:.0f} s -> {folder}")
    return losses


def do(step: Step, number: str, folder: Path, runtime: Runtime) -> Any:
    """Carry a step out, or take what it gave when it was done before."""
    done = folder / "done" / f"{step.name.replace(' ', '-')}.json"
    if runtime.broadcast(done.is_file()):
        runtime.print(f"{number} {step.title}: done before")
        return runtime.broadcast(json.loads(done.read_text()) if runtime.is_main else None)
    runtime.print(f"\n{number} {step.title}")
    started = time.perf_counter()
    result = _plain(step.act())
    gc.collect()
    torch.cuda.empty_cache()
    runtime.barrier()
    if runtime.is_main:
        _write(done, result)
    runtime.print(f"{number} {step.title}: {time.perf_counter() - started:.1f} s")
    if runtime.stop_signal:
        runtime.print(f"{name_of(runtime.stop_signal)}: {step.title} is done; the same command goes on after it")
        raise SystemExit(exit_code(runtime.stop_signal))
    return result


def plan_road(recipe: Recipe, runtime: Runtime, folder: Path) -> list[Step]:
    """All steps in order, with the recipes each stage gets."""
    base, road = with_data(recipe, runtime, folder)
    students = recipe.run.students or {"student": recipe.student}
    check_road(recipe, students, runtime.world_size, folder)
    shape = teacher_architecture(recipe)
    data_parallel = runtime.world_size // recipe.parallel.replica_ranks
    iterate.check_steps(recipe, shape, students, data_parallel)
    if recipe.data.train is not None:
        check_held_out(base)

    def add(name: str, title: str, act: Callable[..., Any], *arguments: Any) -> None:
        road.append(Step(name, title, partial(act, *arguments)))

    def add_evaluation(name: str, checkpoint: Path | str, results: Path | None = None) -> None:
        evaluating = dataclasses.replace(base, checkpoint=str(checkpoint), results=str(results) if results else None)
        add(EVALUATE + name, f"evaluate {name}", evaluate.run, evaluating, runtime)

    teacher = recipe.teacher.checkpoint or str(folder / "teacher")
    base = dataclasses.replace(
        base,
        teacher=dataclasses.replace(base.teacher, checkpoint=teacher),
        scores=recipe.scores or str(folder / "scores.safetensors"),
    )
    if not recipe.teacher.checkpoint:
        add("train-teacher", "train the teacher", train.run, with_train(base, teacher), runtime)
    # Nothing is written into the folder of a teacher that the recipe names.
    add_evaluation("teacher", teacher, folder / "teacher" / "results.json" if recipe.teacher.checkpoint else None)
    if recipe.correct.tokens:
        corrected = str(folder / "corrected")
        correcting = dataclasses.replace(recipe.correct, checkpoint=corrected)
        named = dataclasses.replace(base, name=f"{recipe.name}-corrected", correct=correcting)
        add("correct-teacher", "correct the teacher", correct.run, named, runtime)
        add_evaluation("corrected teacher", corrected)
        base = dataclasses.replace(base, teacher=dataclasses.replace(base.teacher, checkpoint=corrected))
    add("score", "score the teacher", score.run, base, runtime)
    for name, student in students.items():
        pruned, distilled = folder / "students" / name / "pruned", folder / "students" / name / "distilled"
        for part in iterate.parts_of(base, runtime, name, student, shape, pruned.parent):
            road.append(Step(part.name, part.title, part.act))
        add_evaluation(f"{name} pruned", pruned)
        distilling = with_student(base, student, pruned, distilled)
        add(f"distill-{name}", f"distil {name}", distill.run, distilling, runtime)
        add_evaluation(f"{name} distilled", distilled)
        exporting = dataclasses.replace(base, checkpoint=str(distilled), hf=str(folder / "hf" / name))
        add(f"export-{name}", f"export {name}", export_again, exporting, runtime)
    first = next(iter(students))
    for baseline in recipe.run.baselines:
        pruned, target = folder / "students" / first / "pruned", folder / "baselines" / baseline
        title = f"{first} {BASELINE_TITLES[baseline]}"
        add(f"baseline-{baseline}", title, train_baseline, base, runtime, baseline, pruned, target)
        add_evaluation(title, target)
    return road


BASELINE_TITLES = {"next_token": "next-token loss", "random": "random weights"}


def with_data(recipe: Recipe, runtime: Runtime, folder: Path) -> tuple[Recipe, list[Step]]:
    """The recipe with a tokenizer and data, and the steps that make them where the recipe names none."""
    road: list[Step] = []
    if not recipe.tokenizer.model:
        model = str(folder / "tokenizer" / "tokenizer.model")
        recipe = dataclasses.replace(
            recipe, tokenizer=dataclasses.replace(recipe.tokenizer, model=model, overwrite=True)
        )
        road.append(Step("tokenizer", "train the tokenizer", partial(tokenizer.run, recipe, runtime)))
    if recipe.data.train is None:
        prefix = str(folder / "data" / "tokens")
        recipe = dataclasses.replace(
            recipe, preprocess=dataclasses.replace(recipe.preprocess, output_prefix=prefix, overwrite=True)
        )
        making = recipe
        key = recipe.preprocess.json_keys[0]
        held_out = f"{prefix}_valid_{key}_document" if recipe.preprocess.valid_fraction > 0 else None
        data = dataclasses.replace(recipe.data, train=f"{prefix}_{key}_document", valid=recipe.data.valid or held_out)
        recipe = dataclasses.replace(recipe, data=data)
        road.append(Step("preprocess", "text to tokens", partial(preprocess_for, recipe, making, runtime)))
    return recipe, road


def preprocess_for(recipe: Recipe, making: Recipe, runtime: Runtime) -> list[str]:
    """The text of `making` as tokens, from which `recipe` goes on. Every rank calls."""
    prefixes = preprocess.run(making, runtime)
    check_held_out(recipe)
    return prefixes


def check_held_out(recipe: Recipe) -> None:
    """Raise InputError where there is nothing to evaluate on, which else would be seen after the teacher's training."""
    evaluate.held_out(recipe, load_tokenizer(recipe.tokenizer))


def with_train(recipe: Recipe, checkpoint: str) -> Recipe:
    return dataclasses.replace(
        recipe, name=f"{recipe.name}-teacher", train=dataclasses.replace(recipe.train, checkpoint=checkpoint)
    )


def with_student(recipe: Recipe, student: StudentConfig, pruned: Path, distilled: Path) -> Recipe:
    correct = recipe.correct
    if recipe.distill.correct_teacher:
        correct = dataclasses.replace(correct, checkpoint=str(pruned.parent / "corrected"))
    return dataclasses.replace(
        recipe,
        name=f"{recipe.name}-{pruned.parent.name}",
        correct=correct,
        student=dataclasses.replace(student, checkpoint=str(pruned)),
        distill=dataclasses.replace(recipe.distill, load=None, checkpoint=str(distilled)),
        prune=dataclasses.replace(recipe.prune, overwrite=True),
    )


def export_again(recipe: Recipe, runtime: Runtime) -> Path:
    """Export into the run's own folder, over what a run cut off between the export and its mark has left."""
    return export.run(resolve_export(recipe, World(size=runtime.world_size), replaces=True), runtime)


def _plain(result: Any) -> Any:
    """What is kept of a step's result: plain data alone."""
    if isinstance(result, Progress):
        return dataclasses.asdict(result)
    return result if isinstance(result, dict | list | int | float) else str(result)


def _write(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2) + "\n")
