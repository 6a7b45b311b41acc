"""The shape of a teacher, for what needs no weights of it: listing candidates, estimating. Pure."""

from __future__ import annotations

from pathlib import Path

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import find_checkpoint, is_hugging_face, read_architecture
from minitron_mcore.checkpoint.hf_config import find_hugging_face, read_config
from minitron_mcore.errors import InputError
from minitron_mcore.jobs import inputs
from minitron_mcore.jobs.job import NOTHING, Promises, absolute
from minitron_mcore.jobs.train import new_architecture
from minitron_mcore.recipe import Recipe, with_keys

A_SHAPE = (
    "name a checkpoint or a folder with architecture.yaml as teacher.checkpoint, a Hugging Face folder as hf, or give "
    "model.*"
)


def find_shape(recipe: Recipe, promises: Promises = NOTHING) -> tuple[Architecture, str]:
    """(architecture, where it is said) of the teacher: `teacher.checkpoint` (promised, a checkpoint, a folder with
    architecture.yaml alone, or a Hugging Face folder with config.json alone), else `hf`, else `model.*`.

    Raises InputError where nothing says it.
    """
    key, folder = "teacher.checkpoint", recipe.teacher.checkpoint
    if folder and absolute(folder) in promises.models:
        return promises.models[absolute(folder)].architecture, f"{key}={folder}"
    if folder:
        return shape_at(folder, key, recipe), f"{key}={folder}"
    if recipe.hf:
        return read_config(find_hugging_face(recipe.hf), recipe.model.make_vocab_size_divisible_by), f"hf={recipe.hf}"
    if recipe.model.num_layers is None:
        raise InputError(key, None, "is not given", A_SHAPE)
    return _new(recipe, promises), "model"


def says_a_teacher(recipe: Recipe) -> bool:
    """Whether `find_shape` has where to look."""
    return bool(recipe.teacher.checkpoint or recipe.hf) or recipe.model.num_layers is not None


def shape_at(folder: str, key: str, recipe: Recipe) -> Architecture:
    """Of a checkpoint, or of a folder with architecture.yaml or config.json alone, which the recipe names by `key`.

    Raises InputError.
    """
    path = Path(folder)
    if (path / "architecture.yaml").is_file():
        return read_architecture(path)
    if path.is_dir() and is_hugging_face(path):
        return read_config(path, recipe.model.make_vocab_size_divisible_by)
    return read_architecture(find_checkpoint(folder, key)[0])


def _new(recipe: Recipe, promises: Promises) -> Architecture:
    """That of `model.*`; the vocabulary may also be that of a tokenizer which is still to be trained."""
    if recipe.model.vocab_size is not None:
        return new_architecture(recipe, None, promises)
    if recipe.tokenizer.model:
        return new_architecture(recipe, inputs.recipe_tokenizer(recipe, promises), promises)
    return new_architecture(with_keys(recipe, {"model.vocab_size": recipe.tokenizer.vocab_size}), None, promises)
