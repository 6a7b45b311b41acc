"""What `run` refuses before its first step, rather than hours later."""

from __future__ import annotations

import re
from pathlib import Path

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import find_checkpoint, read_architecture, tokenizer_folder
from minitron_mcore.data.blend import check_prefixes, parse_blend
from minitron_mcore.data.corpus import find_files
from minitron_mcore.data.tokenizer import load_tokenizer
from minitron_mcore.distillation.cache.teacher import CachedTeacher, cache_folder, check_cached
from minitron_mcore.distillation.states.map import check_hidden_states
from minitron_mcore.errors import InputError
from minitron_mcore.families.find import find_family
from minitron_mcore.families.table import config_of
from minitron_mcore.importance.depth import check_blocks, measured
from minitron_mcore.importance.multiple_choice import read_questions
from minitron_mcore.jobs.tokenizers import checkpoint_tokenizer, fit_tokenizer
from minitron_mcore.model.recompute import check_recompute
from minitron_mcore.pruning.config import StudentConfig
from minitron_mcore.pruning.plan import check_residual
from minitron_mcore.recipe import Recipe
from minitron_mcore.stages.common import asked_shape, check_model, check_trained_model, refuse_context, teacher_layout
from minitron_mcore.stages.correct import check_load
from minitron_mcore.stages.distill import check_top_k
from minitron_mcore.stages.teachers import check_teacher_keys
from minitron_mcore.stages.train import new_architecture
from minitron_mcore.training.budget import check_train, plan_timetable
from minitron_mcore.training.dashboard import check_wandb
from minitron_mcore.training.learning_rate import check_learning_rate


def check_road(recipe: Recipe, students: dict[str, StudentConfig], world_size: int, folder: Path) -> None:
    """Raise InputError for what no step of the road through `folder` could do. Any rank calls; nothing is written."""
    if recipe.importance.method == "activation":
        refuse_context(recipe, "run")
    teacher = teacher_architecture(recipe)
    check_model(teacher, recipe)
    teacher_layout(recipe, teacher, world_size)
    check_students(recipe, teacher, students)
    check_text(recipe, teacher, folder)
    check_wandb(recipe.log)
    check_blocks(measured(recipe.importance.depth_metrics), recipe.importance.block_lengths, teacher.num_layers)
    if recipe.importance.multiple_choice:
        read_questions(recipe.importance.multiple_choice)
    check_teacher_keys(recipe)
    if cache := cache_folder(recipe.distill.teacher):
        check_cached(CachedTeacher(cache, recipe.distill.temperature), recipe.distill)
    if recipe.correct.tokens:
        check_load(recipe.correct)
    check_top_k(recipe.distill, teacher.vocab_size)
    data_parallel = world_size // recipe.parallel.replica_ranks
    for section, train in (("train", recipe.train), ("correct", recipe.correct), ("distill", recipe.distill)):
        if (section == "train" and recipe.teacher.checkpoint) or (section == "correct" and not recipe.correct.tokens):
            continue
        timetable = plan_timetable(train, recipe.data.sequence_length, section)
        check_train(train, recipe.parallel, data_parallel, timetable, section)
        check_learning_rate(train, timetable, section)
        # What `distill` trains are the students.
        (check_model if section == "distill" else check_trained_model)(teacher, recipe, section)
    if recipe.distill.correct_teacher:
        check_recompute(recipe.correct, teacher, recipe.parallel, "correct")


def teacher_architecture(recipe: Recipe) -> Architecture:
    """The teacher's, stored or yet to be trained."""
    if recipe.teacher.checkpoint:
        return read_architecture(find_checkpoint(recipe.teacher.checkpoint, "teacher.checkpoint")[0])
    made = recipe.tokenizer.model is None
    return new_architecture(
        recipe, recipe.tokenizer.vocab_size if made else load_tokenizer(recipe.tokenizer).vocab_size
    )


def check_students(recipe: Recipe, teacher: Architecture, students: dict[str, StudentConfig]) -> None:
    """Raise InputError for a student that could not be pruned, laid out or exported."""
    for name, student in students.items():
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise InputError(f"run.students: {name!r} is to be a folder's name: use letters, digits, dot, - and _")
        where = f"run.students.{name}" if recipe.run.students else "student"
        shape = asked_shape(recipe, student, teacher)
        check_residual(teacher, shape, recipe.prune.head_residual, recipe.prune.residual_matrices)
        check_trained_model(shape, recipe, "distill")
        check_hidden_states(recipe.distill.hidden_states, shape, teacher, recipe.parallel)
        config_of(find_family(shape.family, where), shape, where)


def check_text(recipe: Recipe, teacher: Architecture, folder: Path) -> None:
    """Raise InputError where the text, the tokens or the tokenizer that the recipe names are not there."""
    given = find_checkpoint(recipe.teacher.checkpoint, "teacher.checkpoint")[0] if recipe.teacher.checkpoint else None
    if given and not recipe.tokenizer.model:
        beside = tokenizer_folder(given)
        raise InputError(
            f"teacher.checkpoint={given} was trained with a tokenizer: name it as tokenizer.model"
            + (f", as in tokenizer.model={beside}" if beside else "")
        )
    if given:
        checkpoint_tokenizer(recipe, given)
    elif recipe.tokenizer.model:
        fit_tokenizer(load_tokenizer(recipe.tokenizer), teacher, recipe)
    elif recipe.data.train is not None:
        raise InputError(f"data.train={recipe.data.train} holds token ids: name the tokenizer's tokenizer.model too")
    makes = {"tokenizer": not recipe.tokenizer.model, "preprocess": recipe.data.train is None}
    for section, is_made in makes.items():
        # Once it is made, the text may be gone.
        if is_made and not (folder / "done" / f"{section}.json").is_file():
            config = getattr(recipe, section)
            key, text = ("input", recipe.input) if config.input is None else (f"{section}.input", config.input)
            find_files(text, config.extensions, key, config.exclude)
    for name in ("train", "valid", "calibration"):
        if (blend := getattr(recipe.data, name)) is not None:
            check_prefixes(parse_blend(blend, f"data.{name}"))
