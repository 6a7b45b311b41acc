"""What jobs read and where they write: models found or promised, folders that may be written. Pure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from minitron_mcore.checkpoint.folder import find_checkpoint, is_iteration, read_architecture, read_lineage
from minitron_mcore.data.corpus import check_folder
from minitron_mcore.errors import InputError
from minitron_mcore.files import refuse_closed
from minitron_mcore.jobs.job import Model, Promises, absolute
from minitron_mcore.recipe import Recipe

TEXT = {"data.train": "the prefix of a .bin/.idx pair"}


def require(recipe: Recipe, needed: dict[str, str], later: dict[str, str] | None = None) -> None:
    """Raise InputError naming all keys of `needed` that are not given. needed: key -> what to name there, in words.

    later: the same, of keys that further checks refuse in words of their own, where nothing else is missing.
    """
    words = needed | (later or {})
    missing = [key for key in words if value_at(recipe, key) in (None, "", 0)]
    if len(missing) == 1 and missing[0] not in needed:
        return
    if len(missing) == 1:
        raise InputError(missing[0], None, "is not given", f"name {words[missing[0]]}")
    if missing:
        remedy = "; ".join(f"{key} is {words[key]}" for key in missing)
        raise InputError(", ".join(missing), None, "are not given", remedy)


def budget_and_text(section: str) -> dict[str, str]:
    """What every training needs besides folders, for `require`."""
    return {f"{section}.tokens": "the budget in tokens, as 2B", **TEXT}


def value_at(recipe: Any, key: str) -> Any:
    """The value at a key's full path."""
    for part in key.split("."):
        recipe = getattr(recipe, part)
    return recipe


def find_model(folder: str | Path | None, key: str, promises: Promises) -> Model:
    """The checkpoint in `folder`, which the recipe names by `key`: promised, else found. Raises InputError."""
    if folder and (promised := promises.models.get(absolute(folder))):
        return Model(key, Path(folder), promised.architecture, None, promised.lineage, promised.tokenizer)
    path, iteration = find_checkpoint(folder, key)
    return Model(key, path, read_architecture(path), iteration, read_lineage(path))


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
