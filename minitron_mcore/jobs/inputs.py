"""What jobs read and where they write: models found or promised, folders that may be written. Pure."""

from __future__ import annotations

import dataclasses
import os
from operator import attrgetter
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import (
    find_checkpoint,
    is_iteration,
    read_architecture,
    read_lineage,
    tokenizer_folder,
)
from minitron_mcore.data.agreement import difference
from minitron_mcore.data.corpus import check_folder
from minitron_mcore.data.described import Described
from minitron_mcore.data.tokenizer import Tokenizer, load_tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.files import refuse_closed
from minitron_mcore.jobs.job import Item, Model, Promises, absolute
from minitron_mcore.jobs.narrow import check_teacher
from minitron_mcore.layout import check_tensor_parallel, split_layers
from minitron_mcore.pruning.config import StudentConfig
from minitron_mcore.pruning.targets import TARGETS, student_shape
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.config import ParallelConfig, check_layout, check_sequence
from minitron_mcore.runtime.notice import warn
from minitron_mcore.runtime.world import World

A_TOKENIZER = "a SentencePiece .model file or a Hugging Face folder"
TEXT = {"data.train": "the prefix of a .bin/.idx pair"}


def require(recipe: Recipe, needed: dict[str, str], later: dict[str, str] | None = None) -> None:
    """Raise InputError naming all keys of `needed` that are not given. needed: key -> what to name there, in words.

    later: the same, of keys that further checks refuse in words of their own, where nothing else is missing.
    """
    words = needed | (later or {})
    missing = [key for key in words if value_at(recipe, key) in (None, "", 0)]
    if len(missing) == 1 and missing[0] in needed:
        raise InputError(missing[0], None, "is not given", f"name {words[missing[0]]}")
    if len(missing) > 1:
        remedy = "; ".join(f"{key} is {words[key]}" for key in missing)
        raise InputError(", ".join(missing), None, "are not given", remedy)


def budget_and_text(section: str, *, is_text: bool = True) -> dict[str, str]:
    """What every training needs besides folders, for `require`; is_text: it reads text, not chats."""
    return {f"{section}.tokens": "the budget in tokens, as 2B", **(TEXT if is_text else {})}


def value_at(recipe: Any, key: str) -> Any:
    """The value at a key's full path."""
    return attrgetter(key)(recipe)


def find_model(folder: str | Path | None, key: str, promises: Promises) -> Model:
    """The checkpoint in `folder`, which the recipe names by `key`: promised, else found. Raises InputError."""
    if folder and (promised := promises.models.get(absolute(folder))):
        return Model(key, Path(folder), promised.architecture, None, promised.lineage, promised.tokenizer)
    path, iteration = find_checkpoint(folder, key)
    return Model(key, path, read_architecture(path), iteration, read_lineage(path))


def data_items(described: Described) -> tuple[Item, ...]:
    """The token files a job reads, for --dry-run."""
    items: dict[Item, None] = {}
    for part in described.parts:
        for prefix in part.blend.prefixes:
            source = described.sources.get(prefix)
            known = source and f"{source.stored_tokens:,} tokens, {source.sequences:,} documents"
            items[Item(part.blend.key, prefix, known or "tokens, made by an earlier step")] = None
    return tuple(items)


def output_folder(value: str | None, key: str) -> Path:
    """The folder to write to. Raises InputError where it is none, or could not be made or read. Makes nothing."""
    if not value:
        raise InputError(key, None, "is not given", "name the folder to write to")
    if os.path.isfile(value):
        raise InputError(key, value, "is a file", "name a folder")
    check_folder(value, key)
    refuse_closed(f"{key}={value}", value)
    if is_iteration(Path(value)):
        raise InputError(key, value, "is an iteration of a checkpoint", "name another folder to write to")
    return Path(value)


def find_reader(
    recipe: Recipe,
    world: World,
    promises: Promises,
    key: str,
    folder: str | None = None,
    *,
    whole: str = "",
    reads_text: bool = True,
    reads_samples: bool = True,
) -> Model:
    """The checkpoint that the recipe names by `key`, with the tokenizer that its texts are read with.

    folder: where it is, of a key that is an entry of a dictionary.

    whole: the verb that needs a whole sequence on a rank. reads_samples: whether samples of data.sequence_length are
    read. Raises InputError where the layout or the tokenizer does not suit it, or there is none.
    """
    model = find_model(folder or value_at(recipe, key), key, promises)
    check_model(model.architecture, recipe, world, reads_text=reads_text and reads_samples)
    if whole and reads_text:
        refuse_context(recipe, whole)
    return dataclasses.replace(model, tokenizer=model_tokenizer(recipe, model, promises) if reads_text else None)


def refuse_context(recipe: Recipe, verb: str) -> None:
    """Raise InputError where sequences are cut over ranks, for a verb that needs a whole one on a rank."""
    if recipe.parallel.context > 1:
        rule = f"is not possible in `{verb}`, which needs a whole sequence on a rank"
        remedy = "set parallel.context=1 and raise parallel.tensor"
        raise InputError("parallel.context", recipe.parallel.context, rule, remedy)


def sizes_of(shape: StudentConfig | Architecture) -> dict[str, Any]:
    """What is pruned of a model, by Megatron's names."""
    return {name: getattr(shape, name) for name in TARGETS}


def asked_shape(recipe: Recipe, student: StudentConfig, teacher: Architecture) -> Architecture:
    """The teacher cut to what `student`, a section, asks for. Raises InputError naming student.<field>."""
    return student_shape(teacher, student, recipe.prune.divisible_by, recipe.parallel)


def check_model(
    architecture: Architecture,
    recipe: Recipe,
    world: World,
    section: str | None = None,
    parallel: ParallelConfig | None = None,
    key: str = "parallel",
    *,
    reads_text: bool = True,
) -> None:
    """Raise InputError where the layout does not suit the ranks or the model, or the sequence length either of them.

    section: that of a training, whose phases may have lengths of their own.
    parallel: the layout, which the recipe names by `key`; None: the recipe's own. reads_text: lengths count.
    """
    parallel, lengths = parallel or recipe.parallel, {"data.sequence_length": recipe.data.sequence_length}
    check_layout(parallel, world.size, key)
    check_tensor_parallel(architecture, parallel.tensor, f"{key}.tensor")
    split_layers(architecture.num_layers, parallel.pipeline, parallel.virtual_pipeline, key)
    for number, phase in enumerate(getattr(recipe, section).phases if section else []):
        if phase.sequence_length is not None:
            lengths[f"{section}.phases[{number}].sequence_length"] = phase.sequence_length
    longest = architecture.max_position_embeddings
    for name, length in lengths.items() if reads_text else ():
        if length > longest and "long_sequences" not in recipe.allow:
            rule = f"is longer than the model's max_position_embeddings={longest}"
            remedy = "shorten it, or use a model of longer context (allow=[long_sequences] goes beyond it)"
            raise InputError(name, length, rule, remedy)
        check_sequence(length, parallel, name, key)


def teacher_layout(recipe: Recipe, teacher: Model, world: World) -> ParallelConfig:
    """How the teacher lies over the ranks beside the student of `distill`: `teacher.parallel`, else as the student.

    Raises InputError, naming the key, where it cannot lie so.
    """
    own, key, architecture = recipe.teacher.parallel, "teacher.parallel", teacher.architecture
    if own is None or own == recipe.parallel:
        own, key = recipe.parallel, "parallel"
    if recipe.teacher.precision == "fp8":
        check_teacher(architecture, own.tensor, world, recipe.cluster)
    check_model(architecture, recipe, world, "distill", own, key)
    if own.context != recipe.parallel.context:
        rule = f"is not parallel.context={recipe.parallel.context}"
        remedy = "teacher and student read the same parts of a sequence, so give both one number"
        raise InputError("teacher.parallel.context", own.context, rule, remedy)
    return own


def model_tokenizer(recipe: Recipe, model: Model, promises: Promises) -> Tokenizer | None:
    """The tokenizer that `model` is read with: the one that lies beside it, else the recipe's; None where it, too, will
    be made by an earlier job. Any rank calls.

    Raises InputError where there is none, where the recipe names another one, or where it does not fit the model.
    """
    if model.iteration is None:
        promised = model.tokenizer or recipe_tokenizer(recipe, promises)
        return fit_tokenizer(promised, model.architecture, recipe) if promised else None
    folder, beside, named = model.folder, tokenizer_folder(model.folder), recipe.tokenizer.model
    tokenizer = load_tokenizer(str(beside) if beside else recipe.tokenizer)
    if named and beside and (given := load_tokenizer(recipe.tokenizer)).fingerprint != tokenizer.fingerprint:
        if difference(given, tokenizer, model.architecture.vocab_size):
            rule = f"is not the tokenizer that {folder} was trained with, which lies in {beside}"
            raise InputError("tokenizer.model", named, rule, "leave tokenizer.model out")
        warn(f"tokenizer.model={named} has the same ids as far as the model goes, so {beside} is used")
    tokenizer = dataclasses.replace(tokenizer, stands_in="other_tokenizer" in recipe.allow)
    stated = model.lineage.get("tokenizer")
    if isinstance(stated, str) and not tokenizer.is_named_by(stated):
        why = f"its fingerprint is {tokenizer.fingerprint[:12]} and lineage.yaml says {stated[:12]}"
        rule = f"is not the tokenizer that {folder} was made with, because {why}"
        remedy = "give that one (allow=[other_tokenizer] takes this one)"
        raise InputError("tokenizer.model", tokenizer.path, rule, remedy)
    return fit_tokenizer(tokenizer, model.architecture, recipe)


def recipe_tokenizer(recipe: Recipe, promises: Promises) -> Tokenizer | None:
    """The one that `tokenizer.model` names; None where an earlier job will make it. Raises InputError."""
    return None if promises.vocab_size(recipe.tokenizer.model) else load_tokenizer(recipe.tokenizer)


def check_same_tokenizer(teacher: Tokenizer, model: Model) -> None:
    """Raise InputError where the student `model` has other ids than its teacher.

    Those beyond either's vocabulary do not count, nor which of them are marks.
    """
    beside, key = tokenizer_folder(model.folder), f"{model.key}={model.folder}"
    tokenizer = load_tokenizer(str(beside)) if beside else None
    student = tokenizer.fingerprint if tokenizer else model.lineage.get("tokenizer")
    if not isinstance(student, str) or teacher.is_named_by(student):
        return
    if tokenizer and difference(teacher, tokenizer, model.architecture.vocab_size) is None:
        warn(f"{key} has another tokenizer than its teacher, of the same ids as far as the model goes")
        return
    ours = f"{teacher.path}, {teacher.fingerprint[:12]}"
    rule = f"has another tokenizer ({student[:12]}) than its teacher ({ours}), and ids must mean the same to both"
    remedy = "name a student or a teacher of the same tokenizer (allow=[other_tokenizer] takes the ids as they are)"
    raise InputError(model.key, model.folder, rule, remedy)


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
        rule, allows = f"has {tokenizer.vocab_size} ids and the model vocab_size={rows}", "allow=[larger_tokenizer]"
        remedy = f"give the one the model was trained with ({allows} takes this one for texts without those ids)"
        raise InputError("tokenizer.model", tokenizer.path, rule, remedy)
    names = ", ".join(repr(tokenizer.pieces()[number]) for number in beyond[:3]) + (" …" if len(beyond) > 3 else "")
    warn(
        f"tokenizer.model={tokenizer.path} has {len(beyond)} ids beyond the model's vocab_size={rows} ({names}): "
        "a text that holds one is refused"
    )
    return dataclasses.replace(tokenizer, rows=min(rows, tokenizer.rows or rows))
