"""`distill`: train the pruned student from the co-located teacher, for a token budget (arXiv 2407.14679, section 3)."""

from __future__ import annotations

import math

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import (
    find_checkpoint,
    latest_iteration,
    read_architecture,
    read_lineage,
)
from minitron_mcore.checkpoint.store import as_chunks, check_architecture, load_weights
from minitron_mcore.distillation.config import DistillConfig
from minitron_mcore.distillation.objective import Objective
from minitron_mcore.distillation.teacher import Teacher
from minitron_mcore.errors import InputError
from minitron_mcore.model.gpt import build_model
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages.common import (
    check_model,
    check_same_tokenizer,
    check_tokenizer,
    checkpoint_tokenizer,
    lay_out,
    output_folder,
    read_data,
    refuse_other_run,
)
from minitron_mcore.stages.fitting import fit_model
from minitron_mcore.training.job import Progress


def run(recipe: Recipe, runtime: Runtime) -> Progress:
    """Distil to `distill.tokens`; the same command goes on where it was cut off.

    `distill.load` (by default `student.checkpoint`) is the pruned student, `distill.checkpoint` where it is trained.
    """
    lay_out(recipe, runtime)
    distill = recipe.distill
    check_loss(distill)
    teacher_folder, teacher_iteration = find_checkpoint(recipe.teacher.checkpoint, "teacher.checkpoint")
    key = "distill.load" if distill.load else "student.checkpoint"
    student_folder, student_iteration = find_checkpoint(distill.load or recipe.student.checkpoint, key)
    folder = output_folder(distill.checkpoint, "distill.checkpoint")
    if folder.resolve() in (student_folder.resolve(), teacher_folder.resolve()):
        raise InputError(f"distill.checkpoint={folder} is the student's or the teacher's own folder: name another")

    # Teacher and student: the same vocabulary, and the tokenizer of both.
    tokenizer = checkpoint_tokenizer(recipe, teacher_folder)
    teacher_architecture, architecture = read_architecture(teacher_folder), read_architecture(student_folder)
    check_vocabulary(teacher_architecture, architecture)
    check_tokenizer(tokenizer, architecture)
    check_same_tokenizer(tokenizer, student_folder, key)
    for model in (teacher_architecture, architecture):
        check_model(model, recipe)
    refuse_other_run(folder, recipe, ("data", "distill", "teacher"), "distill.checkpoint", "distill")
    resuming = latest_iteration(folder) is not None
    if resuming:
        check_architecture(folder, architecture)
    data = read_data(recipe, tokenizer, distill, "distill")

    teacher = Teacher.load(teacher_folder, teacher_iteration, teacher_architecture, recipe.parallel, recipe.precision)
    chunks = build_model(architecture, recipe.parallel, recipe.precision)
    if not resuming:
        load_weights(student_folder, student_iteration, as_chunks(chunks), architecture)
    runtime.print(
        f"distill: teacher {teacher_architecture.num_parameters:,} -> student {architecture.num_parameters:,} "
        f"parameters, {data[0]} iterations of {distill.global_batch_size * recipe.data.sequence_length:,} tokens "
        f"-> {folder}"
    )
    objective = Objective(
        vocab_size=architecture.vocab_size,
        lm_weight=distill.lm_weight,
        kd_weight=distill.kd_weight,
        temperature=distill.temperature,
        chunk_tokens=distill.loss_chunk_tokens,
        teacher=teacher,
    )
    return fit_model(
        recipe,
        runtime,
        train=distill,
        folder=folder,
        chunks=chunks,
        architecture=architecture,
        objective=objective,
        tokenizer=tokenizer,
        data=data,
        source=student_folder,
        lineage=lambda: {
            "stage": "distill",
            "student": {"checkpoint": str(student_folder), **read_lineage(student_folder)},
            "teacher": {"checkpoint": str(teacher_folder), "iteration": teacher_iteration},
        },
    )


def check_loss(distill: DistillConfig) -> None:
    """Raise InputError for weights and a temperature that make no loss."""
    if not 0 < distill.temperature < math.inf:
        raise InputError(f"distill.temperature={distill.temperature} must be finite and above 0")
    for name in ("kd_weight", "lm_weight"):
        if not 0 <= getattr(distill, name) < math.inf:
            raise InputError(f"distill.{name}={getattr(distill, name)} must be finite and at least 0")
    if distill.kd_weight == distill.lm_weight == 0:
        raise InputError("distill.kd_weight=0 and distill.lm_weight=0 leave no loss to train on: raise one of them")


def check_vocabulary(teacher: Architecture, student: Architecture) -> None:
    """Raise InputError where the two output distributions are not over the same ids."""
    for field in ("vocab_size", "padded_vocab_size"):
        ours, theirs = getattr(student, field), getattr(teacher, field)
        if ours != theirs:
            raise InputError(
                f"{field} is {ours} in student.checkpoint and {theirs} in teacher.checkpoint: a student is distilled "
                "from a teacher of the same vocabulary"
            )
