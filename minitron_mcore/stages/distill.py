"""`distill`: train the pruned student from its teacher, for a token budget (arXiv 2407.14679, section 3)."""

from __future__ import annotations

from pathlib import Path

from minitron_mcore.checkpoint.folder import find_checkpoint, latest_iteration, read_architecture, read_lineage
from minitron_mcore.checkpoint.store import as_chunks, check_architecture, load_weights
from minitron_mcore.distillation.cache.teacher import cache_folder
from minitron_mcore.distillation.config import DistillConfig
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.distillation.objective import Objective
from minitron_mcore.distillation.states.loss import StateLosses
from minitron_mcore.distillation.states.map import check_hidden_states
from minitron_mcore.distillation.teacher.ahead import Teacher
from minitron_mcore.errors import InputError
from minitron_mcore.estimate.exhausted import explaining_memory
from minitron_mcore.model.gpt import build_model
from minitron_mcore.model.recompute import recompute_of
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages.common import check_trained_model, lay_out, output_folder, read_data, refuse_other_run
from minitron_mcore.stages.fitting import fit_model, forecast_here
from minitron_mcore.stages.teachers import cache_teaching, check_teacher_keys, model_teaching
from minitron_mcore.training.job import Progress


def run(recipe: Recipe, runtime: Runtime) -> Progress:
    """Distil to `distill.tokens`; the same command goes on where it was cut off.

    `distill.load` (by default `student.checkpoint`) is the pruned student, `distill.checkpoint` where it is trained.
    """
    lay_out(recipe, runtime)
    distill = recipe.distill
    check_teacher_keys(recipe)

    # The student, where it goes, and who teaches it.
    key = "distill.load" if distill.load else "student.checkpoint"
    student_folder, iteration = find_checkpoint(distill.load or recipe.student.checkpoint, key)
    architecture = read_architecture(student_folder)
    folder = output_folder(distill.checkpoint, "distill.checkpoint")
    refuse_own_folder(folder, {key: str(student_folder), "teacher.checkpoint": recipe.teacher.checkpoint})
    cache = cache_folder(distill.teacher)
    if cache is not None:
        teaching = cache_teaching(recipe, runtime, cache, architecture, student_folder)
    else:
        teaching = model_teaching(recipe, runtime, architecture, student_folder, key)
        assert teaching.architecture is not None
        check_hidden_states(distill.hidden_states, architecture, teaching.architecture, recipe.parallel)
    check_top_k(distill, architecture.vocab_size)
    check_trained_model(architecture, recipe, "distill")
    refuse_other_run(folder, recipe, teaching.compared, "distill.checkpoint", "distill")
    resuming = latest_iteration(folder) is not None
    if resuming:
        check_architecture(folder, architecture)
    data = read_data(recipe, teaching.tokenizer, distill, "distill", least_samples=teaching.samples)
    memory = forecast_here(recipe, runtime, "distill", architecture, data.timetable, teaching.architecture)
    if cache is None:
        warn_of_itself(recipe, runtime, student_folder, iteration, key)

    with explaining_memory(memory, "while loading"):
        teacher = teaching.load(data.timetable)
        chunks = build_model(architecture, recipe.parallel, recipe.precision, recompute=recompute_of(distill))
        if not resuming:
            load_weights(student_folder, iteration, as_chunks(chunks), architecture)
    states = None
    if distill.hidden_states.sites and isinstance(teacher, Teacher):
        wide = teacher.architecture
        states = StateLosses(chunks, distill.hidden_states, architecture, wide, recipe.parallel, seed=recipe.seed)
        teacher.want_states(states.pairs, architecture.num_layers)
    runtime.print(
        f"distill: {teaching.words} -> student {architecture.num_parameters:,} parameters, {data.timetable} -> {folder}"
    )
    settings = LossSettings.of(distill, architecture.vocab_size)
    objective = Objective(settings, teacher, states, window=distill.teacher_window)
    return fit_model(
        recipe,
        runtime,
        section="distill",
        folder=folder,
        chunks=chunks,
        architecture=architecture,
        objective=objective,
        tokenizer=teaching.tokenizer,
        data=data,
        source=student_folder,
        memory=memory,
        lineage=lambda: {
            "stage": "distill",
            "student": {"checkpoint": str(student_folder), **read_lineage(student_folder)},
            "teacher": teaching.lineage,
        },
    )


def refuse_own_folder(folder: Path, read: dict[str, str | None]) -> None:
    """Raise InputError where the output `folder` is one of those that are `read`, by their keys."""
    for key, given in read.items():
        # A teacher that is cached need not be there.
        if given and Path(given).is_dir() and folder.resolve() == find_checkpoint(given, key)[0].resolve():
            raise InputError(f"distill.checkpoint={folder} is the student's or the teacher's own folder: name another")


def warn_of_itself(recipe: Recipe, runtime: Runtime, student_folder: Path, iteration: int, key: str) -> None:
    """Say on the first rank where the student, which the recipe names by `key`, starts as its own teacher."""
    folder, same = find_checkpoint(recipe.teacher.checkpoint, "teacher.checkpoint")
    if folder.resolve() == student_folder.resolve() and same == iteration:
        runtime.print(
            f"WARNING: {key}={student_folder} and teacher.checkpoint are iteration {iteration} of the same checkpoint: "
            "the student starts as its teacher, at a divergence of 0 that training can only raise"
        )


def check_top_k(distill: DistillConfig, vocab_size: int) -> None:
    """Raise InputError where the teacher has fewer tokens."""
    if distill.top_k > vocab_size:
        rule = f"must lie between 0, for the whole vocabulary, and its {vocab_size}"
        raise InputError("distill.top_k", distill.top_k, rule, "lower it")
