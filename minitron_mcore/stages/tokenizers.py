"""Whether tokenizers and models belong together, and what of a tokenizer a model has no rows for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import read_architecture, read_lineage, tokenizer_folder
from minitron_mcore.data.agreement import difference
from minitron_mcore.data.tokenizer import Tokenizer, load_tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.notice import warn


def check_lineage(tokenizer: Tokenizer, folder: Path) -> None:
    """Raise InputError where the lineage of the checkpoint in `folder` names another tokenizer."""
    stated = read_lineage(folder).get("tokenizer")
    if isinstance(stated, str) and not tokenizer.is_named_by(stated):
        raise InputError(
            f"tokenizer.model={tokenizer.path} is not the tokenizer that {folder} was made with: its fingerprint is "
            f"{tokenizer.fingerprint[:12]}, lineage.yaml says {stated[:12]}; give that one "
            "(allow=[other_tokenizer] takes this one)"
        )


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
    raise InputError(
        f"{key}={student_folder} has another tokenizer ({student[:12]}) than its teacher ({teacher.path}, "
        f"{teacher.fingerprint[:12]}): a student is distilled from a teacher of the same tokenizer "
        "(allow=[other_tokenizer] takes the ids as they are)"
    )


def fit_tokenizer(tokenizer: Tokenizer, architecture: Architecture, recipe: Recipe) -> Tokenizer:
    """`tokenizer` for texts of a model that may have fewer rows than it has ids.

    Where those without one are marks and added tokens alone, or allow=[larger_tokenizer], that is said, and texts that
    hold them are refused where they are read. Else raises InputError.
    """
    rows = architecture.vocab_size
    if tokenizer.vocab_size <= rows:
        return tokenizer
    beyond = sorted(number for number in tokenizer.pieces() if number >= rows)
    ordinary = [number for number in beyond if number not in tokenizer.added]
    if ordinary and "larger_tokenizer" not in recipe.allow:
        raise InputError(
            f"tokenizer.model={tokenizer.path} has {tokenizer.vocab_size} ids and the model vocab_size={rows}: use the "
            "tokenizer the model was trained with (allow=[larger_tokenizer] takes this one for texts without those ids)"
        )
    names = ", ".join(repr(tokenizer.pieces()[number]) for number in beyond[:3]) + (" …" if len(beyond) > 3 else "")
    warn(
        f"tokenizer.model={tokenizer.path} has {len(beyond)} ids beyond the model's vocab_size={rows} ({names}): "
        "a text that holds one is refused"
    )
    return dataclasses.replace(tokenizer, rows=min(rows, tokenizer.rows or rows))
