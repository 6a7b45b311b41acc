"""Whether tokenizers and models belong together, and what of a tokenizer a model has no rows for. Pure."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import read_architecture, read_lineage, tokenizer_folder
from minitron_mcore.data.agreement import difference
from minitron_mcore.data.tokenizer import Tokenizer, load_tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.jobs.job import Model, Promises, absolute
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.notice import warn


def model_tokenizer(recipe: Recipe, model: Model, promises: Promises) -> Tokenizer | None:
    """The tokenizer that `model` is read with; None where it, too, will be made by an earlier job.

    Raises InputError where there is none, where the recipe names another one, or where it does not fit the model.
    """
    if model.iteration is not None:
        return checkpoint_tokenizer(recipe, model.folder)
    if model.tokenizer is not None:
        return fit_tokenizer(model.tokenizer, model.architecture, recipe)
    tokenizer = recipe_tokenizer(recipe, promises)
    return fit_tokenizer(tokenizer, model.architecture, recipe) if tokenizer else None


def recipe_tokenizer(recipe: Recipe, promises: Promises) -> Tokenizer | None:
    """The one that `tokenizer.model` names; None where an earlier job will make it. Raises InputError."""
    model = recipe.tokenizer.model
    return None if model and absolute(model) in promises.tokenizers else load_tokenizer(recipe.tokenizer)


def checkpoint_tokenizer(recipe: Recipe, folder: Path) -> Tokenizer:
    """The tokenizer that lies beside the checkpoint in `folder`, else the recipe's. Any rank calls.

    Raises InputError where there is neither, where the recipe names another one, or where it does not fit the model.
    """
    beside = tokenizer_folder(folder)
    given = load_tokenizer(recipe.tokenizer) if recipe.tokenizer.model or beside is None else None
    tokenizer = load_tokenizer(str(beside)) if beside is not None else given
    assert tokenizer is not None
    rows = read_architecture(folder).vocab_size
    named = recipe.tokenizer.model
    if given is not None and given.fingerprint != tokenizer.fingerprint:
        if difference(given, tokenizer, rows):
            rule = f"is not the tokenizer that {folder} was trained with, which lies in {beside}"
            raise InputError("tokenizer.model", named, rule, "leave tokenizer.model out")
        warn(f"tokenizer.model={named} has the same ids as far as the model goes, so {beside} is used")
    tokenizer = dataclasses.replace(tokenizer, stands_in="other_tokenizer" in recipe.allow)
    check_lineage(tokenizer, folder)
    return fit_tokenizer(tokenizer, read_architecture(folder), recipe)


def check_lineage(tokenizer: Tokenizer, folder: Path) -> None:
    """Raise InputError where the lineage of the checkpoint in `folder` names another tokenizer."""
    stated = read_lineage(folder).get("tokenizer")
    if isinstance(stated, str) and not tokenizer.is_named_by(stated):
        rule = (
            f"is not the tokenizer that {folder} was made with, because its fingerprint is "
            f"{tokenizer.fingerprint[:12]} and lineage.yaml says {stated[:12]}"
        )
        remedy = "give that one (allow=[other_tokenizer] takes this one)"
        raise InputError("tokenizer.model", tokenizer.path, rule, remedy)


def check_same_tokenizer(teacher: Tokenizer, student_folder: Path, key: str) -> None:
    """Raise InputError where the checkpoint `key`=`student_folder` has other ids than its teacher.

    Those beyond either's vocabulary do not count, nor which of them are marks.
    """
    beside = tokenizer_folder(student_folder)
    tokenizer = load_tokenizer(str(beside)) if beside else None
    student = tokenizer.fingerprint if tokenizer else read_lineage(student_folder).get("tokenizer")
    if not isinstance(student, str) or teacher.is_named_by(student):
        return
    if tokenizer and difference(teacher, tokenizer, read_architecture(student_folder).vocab_size) is None:
        warn(f"{key}={student_folder} has another tokenizer than its teacher, of the same ids as far as the model goes")
        return
    rule = (
        f"has another tokenizer ({student[:12]}) than its teacher ({teacher.path}, {teacher.fingerprint[:12]}), and "
        "ids must mean the same to both"
    )
    remedy = "name a student or a teacher of the same tokenizer (allow=[other_tokenizer] takes the ids as they are)"
    raise InputError(key, student_folder, rule, remedy)


def fit_tokenizer(tokenizer: Tokenizer, architecture: Architecture, recipe: Recipe) -> Tokenizer:
    """`tokenizer` for texts of a model that may have fewer rows than it has ids.

    Where only marks and added tokens have no row, or with allow=[larger_tokenizer], warns, and texts that hold such ids
    are refused when they are read. Otherwise raises InputError.
    """
    rows = architecture.vocab_size
    if tokenizer.vocab_size <= rows:
        return tokenizer
    beyond = sorted(number for number in tokenizer.pieces() if number >= rows)
    ordinary = [number for number in beyond if number not in tokenizer.added]
    if ordinary and "larger_tokenizer" not in recipe.allow:
        rule = f"has {tokenizer.vocab_size} ids and the model vocab_size={rows}"
        raise InputError(
            "tokenizer.model",
            tokenizer.path,
            rule,
            "give the one the model was trained with (allow=[larger_tokenizer] takes this one for texts without those "
            "ids)",
        )
    names = ", ".join(repr(tokenizer.pieces()[number]) for number in beyond[:3]) + (" …" if len(beyond) > 3 else "")
    warn(
        f"tokenizer.model={tokenizer.path} has {len(beyond)} ids beyond the model's vocab_size={rows} ({names}): "
        "a text that holds one is refused"
    )
    return dataclasses.replace(tokenizer, rows=min(rows, tokenizer.rows or rows))
