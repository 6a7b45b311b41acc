"""`distill`: train the pruned student from its teacher, for a token budget (arXiv 2407.14679, section 3). Pure.

Who teaches is a model beside the student, that model while it is itself corrected, or a cache of its targets.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import identify_weights, iteration_folder, read_lineage, resumed_iteration
from minitron_mcore.distillation.cache.serving import cache_folder
from minitron_mcore.distillation.config import check_window
from minitron_mcore.distillation.states.map import check_hidden_states
from minitron_mcore.errors import InputError
from minitron_mcore.jobs import inputs
from minitron_mcore.jobs.cache import check_cache_serves, check_promised, lineage_of
from minitron_mcore.jobs.chats import Chats, samples_of
from minitron_mcore.jobs.continuation import read_so_far, refuse_other_run
from minitron_mcore.jobs.job import NOTHING, Model, Promises, absolute
from minitron_mcore.jobs.train import Teaching, TrainingJob, resolve_training
from minitron_mcore.model.recompute import check_recompute
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.world import World
from minitron_mcore.training.budget import plan_timetable
from minitron_mcore.training.learning_rate import check_learning_rate


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING) -> TrainingJob:
    """A distillation to `distill.tokens`; the same command goes on where it was cut off. Raises InputError.

    `distill.load` (by default `student.checkpoint`) is the pruned student, `distill.checkpoint` where it is trained.
    """
    distill, teacher = recipe.distill, recipe.teacher.checkpoint
    key = "distill.load" if distill.load else "student.checkpoint"
    cache = cache_folder(distill.teacher)
    needed = {key: "the folder of the pruned student", "distill.checkpoint": "the folder to write to"}
    needed |= {} if cache else {"teacher.checkpoint": "the folder of the teacher"}
    reads_chats = recipe.chat.train is not None
    inputs.require(recipe, needed, inputs.budget_and_text("distill", is_text=not reads_chats))
    check_teacher_keys(recipe)
    if reads_chats:
        check_chat_keys(recipe, cache)
    student = inputs.find_model(inputs.value_at(recipe, key), key, promises)
    shape, folder = student.architecture, str(distill.checkpoint)
    if absolute(folder) in [absolute(each) for each in (student.folder, teacher) if each]:
        raise InputError("distill.checkpoint", folder, "is the student's or the teacher's own folder", "name another")
    compared: tuple[str, ...] = ("data", "distill")
    if cache is not None:
        tokenizer = inputs.model_tokenizer(recipe, student, promises)
        asked: dict[str, Any] = {"cache": str(cache)}
        if absolute(cache) in promises.items:
            samples = check_promised(recipe, shape.vocab_size)
        else:
            settings = check_cache_serves(recipe, cache, tokenizer, shape)
            asked, samples = {**asked, **lineage_of(settings)}, settings["num_samples"]
        teaching = Teaching(tokenizer, asked, cache=cache, samples=samples)
    else:
        teaching = model_teaching(recipe, world, promises, student)
        compared = (*compared, "teacher", *(["correct"] if teaching.corrected else []))
    if distill.top_k > shape.vocab_size:
        rule = f"is more than the student's vocab_size={shape.vocab_size}"
        raise InputError("distill.top_k", distill.top_k, rule, "lower it")
    origin = {"checkpoint": str(student.folder), **student.lineage}
    if distill.random_weights:
        origin = {"random_weights": True, "shape_of": str(student.folder)}
    lineage = {"stage": "distill", "student": origin, "teacher": teaching.lineage}
    chats = None
    if reads_chats:
        compared = (*compared, "chat")
        chats = chats_of(recipe, teaching)
    return resolve_training(
        recipe, world, promises, "distill", student, shape, teaching.tokenizer, compared, lineage, teaching, chats=chats
    )


def check_chat_keys(recipe: Recipe, cache: Path | None) -> None:
    """Raise InputError for keys that do not go with chats in place of text."""
    if recipe.data.train is not None:
        rule = "and data.train both name what is learnt from"
        raise InputError("chat.train", recipe.chat.train, rule, "leave one of them out")
    if cache is not None:
        rule = "holds the targets of text, not of chats"
        raise InputError("distill.teacher", recipe.distill.teacher, rule, "leave it out, and give teacher.checkpoint")
    if recipe.distill.phases:
        rule = "does not go with chats, whose rows are of one length"
        raise InputError("distill.phases", None, rule, "leave it out")


def chats_of(recipe: Recipe, teaching: Teaching) -> Chats:
    """The answers of chats, as the student learns what the teacher says there (distilled supervised fine-tuning, arXiv
    2310.16944, section 3.1, with the teacher's distribution in place of its words). Raises InputError."""
    if teaching.tokenizer is None:
        rule = "is made by an earlier step of the run, so its tokenizer is not known yet"
        raise InputError("teacher.checkpoint", recipe.teacher.checkpoint, rule, "distil by a command of its own")
    layouts = {"parallel": recipe.parallel}
    layouts |= {"teacher.parallel": recipe.teacher.parallel} if recipe.teacher.parallel else {}
    samples = samples_of(recipe, teaching.tokenizer, Path(str(recipe.distill.checkpoint)), layouts)
    return Chats.of(samples, recipe.distill, "distill")


def model_teaching(recipe: Recipe, world: World, promises: Promises, student: Model) -> Teaching:
    """`teacher.checkpoint`, under its own layout, placement and precision if asked.

    Raises InputError where it and `student` do not belong together.
    """
    model = inputs.find_model(recipe.teacher.checkpoint, "teacher.checkpoint", promises)
    lineage: dict[str, Any] = {"checkpoint": str(model.folder)}
    notes = []
    if (newest := model.iteration) is not None:
        began = taught_so_far(recipe.distill.checkpoint, model)
        if began != newest:
            notes.append(
                f"goes on with iteration {began} of teacher.checkpoint={model.folder}, with which it began; the newest "
                f"is {newest}"
            )
            model = dataclasses.replace(model, iteration=began)
        lineage |= identify_weights(model.folder, began)
    check_vocabulary(model.architecture, student.architecture)
    tokenizer = inputs.model_tokenizer(recipe, model, promises)
    if tokenizer is not None:
        tokenizer = inputs.fit_tokenizer(tokenizer, student.architecture, recipe)
        if student.iteration is not None:
            inputs.check_same_tokenizer(tokenizer, student)
    layout = inputs.teacher_layout(recipe, model, world)
    corrected = None
    if recipe.distill.correct_teacher:
        corrected = Model("correct.checkpoint", corrected_folder(recipe, model.folder), model.architecture)
        lineage["corrected"] = str(corrected.folder)
        check_recompute(recipe.correct, model.architecture, recipe.parallel, "correct")
    if model.iteration is not None and is_itself(model, student):
        notes.append(
            f"{student.key}={student.folder} and teacher.checkpoint are iteration {model.iteration} of the same "
            "checkpoint: the student starts as its teacher, at a divergence of 0 that training can only raise"
        )
    sites = recipe.distill.hidden_states
    check_hidden_states(sites, student.architecture, model.architecture, recipe.parallel)
    return Teaching(tokenizer, lineage, model, layout, corrected, notes=tuple(notes))


def is_itself(teacher: Model, student: Model) -> bool:
    return (absolute(teacher.folder), teacher.iteration) == (absolute(student.folder), student.iteration)


def taught_so_far(student: str | None, teacher: Model) -> int:
    """The teacher's iteration that the run in the folder `student` was distilled from so far; its newest for a new run.

    Raises InputError where that is not there any more, or has changed.
    """
    _, newest = teacher.place
    if student is None or resumed_iteration(Path(student)) is None:
        return newest
    lineage = read_lineage(Path(student))
    before = lineage.get("teacher", {})
    if lineage.get("stage") != "distill" or "targets" in before:
        return newest
    return read_so_far(before, teacher, "distill.checkpoint", student, "was distilled so far from", "teacher")


def check_teacher_keys(recipe: Recipe) -> None:
    """Raise InputError for keys about the teacher that do not go together."""
    parallel, distill = recipe.parallel, recipe.distill
    check_window(distill.teacher_window, parallel, "distill.teacher_window")
    if not distill.correct_teacher:
        return
    # Key -> the values that go with it.
    with_correction: dict[str, tuple[Any, ...]] = {
        "teacher.placement": ("resident",),
        "teacher.parallel": (None, parallel),
        "teacher.precision": (None, recipe.precision),
        "distill.teacher_window": (0,),
        "distill.teacher": (None,),
        "correct.tokens": (0,),
        "correct.load": (None,),
        "correct.phases": ([],),
        "correct.tp_comm_overlap": (False,),  # the buffers are the student's
        "correct.rampup_batch_size": (None,),
        # Its checkpoints are those of the student's iterations.
        "correct.keep_last": (None,),
        "correct.keep_every": (None,),
        "correct.keep_best": (None,),
    }
    for key, allowed in with_correction.items():
        if (value := inputs.value_at(recipe, key)) not in allowed:
            does = "trains the teacher beside the student in its layout and for its tokens"
            rule = f"does not go with distill.correct_teacher=true, which {does}"
            is_section = key in ("teacher.parallel", "correct.phases")
            raise InputError(key, None if is_section else value, rule, "leave one of the two out")
    timetable = plan_timetable(distill, recipe.data.sequence_length, "distill")
    correct = dataclasses.replace(recipe.correct, tokens=distill.tokens)
    check_learning_rate(correct, timetable, "correct", budget="distill")


def corrected_folder(recipe: Recipe, teacher_folder: Path) -> Path:
    """Where a teacher that is corrected as it teaches is kept. Raises InputError for a folder that cannot be it."""
    key, student = "correct.checkpoint", Path(recipe.distill.checkpoint or "")
    folder = inputs.output_folder(recipe.correct.checkpoint, key)
    for other, taken in (("teacher.checkpoint", teacher_folder), ("distill.checkpoint", student)):
        if absolute(folder) == absolute(taken):
            raise InputError(key, folder, f"is {other}'s own folder", "name another")
    # Its learning rate follows the budget of `distill`.
    sections = ("data", "teacher", "correct", "distill")
    refuse_other_run(folder, recipe, sections, key, "correct", keeps_budget=True)
    stands_at = resumed_iteration(student)
    was_corrected = "corrected" in read_lineage(student).get("teacher", {})
    if stands_at is not None and was_corrected and not iteration_folder(folder, stands_at).is_dir():
        rule = f"has no iteration {stands_at}, at which distill.checkpoint={student} stands"
        raise InputError(key, folder, rule, "name the folder that this run's teacher was saved to")
    return folder


def check_vocabulary(teacher: Architecture, student: Architecture) -> None:
    """Raise InputError where the two output distributions are not over the same ids, or the teacher is the smaller."""
    for field in ("vocab_size", "padded_vocab_size"):
        ours, theirs = getattr(student, field), getattr(teacher, field)
        if ours != theirs:
            rule = f"is {ours} in student.checkpoint and {theirs} in teacher.checkpoint"
            raise InputError(field, None, rule, "a student is distilled from a teacher of the same vocabulary")
    if student.num_parameters > teacher.num_parameters:
        rule = f"has {student.num_parameters:,} parameters and teacher.checkpoint {teacher.num_parameters:,}"
        raise InputError("student.checkpoint", None, rule, "the teacher is the larger one; swap the two")
