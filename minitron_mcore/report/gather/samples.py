"""The prepared samples of a training that learns from chats or preferences, and the budget that follows. Pure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minitron_mcore.alignment.config import PREFERENCES, in_tokens
from minitron_mcore.data.chat.packing import rows_of
from minitron_mcore.data.chat.prepared import FACTS, load_prepared
from minitron_mcore.errors import InputError
from minitron_mcore.recipe import Recipe
from minitron_mcore.report.gather.place import read_json, read_mapping_of
from minitron_mcore.training.budget import Timetable, plan_timetable

CHATS = "chats"  # in the folder of a training, unless chat.cache_path says where


def find_samples(part: Path, recipe: Recipe) -> tuple[Path | None, dict[str, Any]]:
    """Where the samples lie that the training in `part` was last saved with, and what is said of them; None and {}
    where that cannot be told."""
    digest = read_mapping_of(part / "lineage.yaml").get("samples")
    cached = [Path(recipe.chat.cache_path)] if recipe.chat.cache_path else []
    files = [file for folder in (part / CHATS, *cached) for file in sorted(folder.glob(f"*/{FACTS}"))]
    for file in files:
        found = read_json(file)
        if not isinstance(found, dict) or not all(isinstance(found.get(name), dict) for name in ("parts", "sources")):
            continue
        if found.get("digest") == digest or (digest is None and len(files) == 1):
            return file.parent, found
    return None, {}


def row_length(recipe: Recipe) -> int:
    """Positions of a row of `align`: of a preference, unless it is packed, a sequence for each side."""
    both = recipe.align.method in PREFERENCES and not recipe.chat.packing
    return recipe.data.sequence_length * (2 if both else 1)


def align_timetable(part: Path, recipe: Recipe) -> Timetable | None:
    """Of the round in `part`; None where its budget is in samples or epochs of what is not there."""
    rows = units = 1
    if not recipe.align.tokens:
        folder, _ = find_samples(part, recipe)
        try:
            if folder is None or not (train := load_prepared(folder).parts["train"]).units:
                return None
        except (InputError, KeyError):
            return None
        packed = rows_of(train, recipe.data.sequence_length, packing=recipe.chat.packing, seed=recipe.seed)
        units = train.units
        rows = units if packed is None else len(packed)
    length = row_length(recipe)
    try:
        return plan_timetable(in_tokens(recipe.align, rows, units, length), length, "align")
    except InputError:
        return None
