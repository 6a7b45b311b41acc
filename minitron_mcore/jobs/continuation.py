"""Whether a run in a folder goes on by a recipe: which keys may differ, and what counts as the same file. Pure.

A key may differ where its metadata say so (keys.py: may_change, budget). Files are compared by what they hold, not by
how they are written: data/x.bin is data/x, a relative path is the absolute one, and a copy on another mount is the
same data or checkpoint. What a run has read is recorded beside it, so that it is known where it no longer lies there.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from minitron_mcore.checkpoint.folder import (
    find_checkpoint,
    identify_weights,
    iteration_folder,
    read_lineage,
    resumed_iteration,
)
from minitron_mcore.data.blend import as_number
from minitron_mcore.distillation.cache.file import DESCRIPTION
from minitron_mcore.distillation.config import CACHE
from minitron_mcore.errors import InputError, shown
from minitron_mcore.files import read_mapping
from minitron_mcore.jobs.chats import Chats, budget_in_tokens, budget_of
from minitron_mcore.jobs.job import Model
from minitron_mcore.keys import entry_of, is_path, options_of, section_of
from minitron_mcore.model.config import LEFT_OUT
from minitron_mcore.recipe import Recipe
from minitron_mcore.training.config import PhaseConfig, TrainConfig
from minitron_mcore.training.learning_rate import check_continuation

# Beside a recipe.yaml of `run`; of a trained checkpoint the same stands in its lineage.
SOURCES = "sources.yaml"
# What may be given with phases instead of being changed on the way.
PHASED = ("sequence_length", "global_batch_size", "micro_batch_size")
_WINDOWS, _WINDOW = 64, 1 << 16


def refuse_other_run(
    folder: Path,
    recipe: Recipe,
    sections: tuple[str, ...],
    key: str,
    stage: str | None = None,
    *,
    keeps_budget: bool = False,
    chats: Chats | None = None,
) -> None:
    """Raise InputError where `folder` holds a run of another recipe, which would be overwritten or mixed.

    Compares `sections`, the seed and the precision with the stored recipe, ignoring keys that do not affect results;
    and, where `stage`, a section of training, is given, that a checkpoint there is of that stage. Its budget may change
    as far as what is done, and the learning rate so far, stay the same; not at all where it `keeps_budget`. chats: what
    is trained on in place of text.
    """
    stored_file = folder / "recipe.yaml"
    if not stored_file.is_file():
        if folder.is_dir() and any(folder.glob("iter_*")):
            raise InputError(key, folder, "holds checkpoints but no recipe.yaml", "name another folder")
        if (folder / DESCRIPTION).is_file():
            raise InputError(key, folder, "holds a cache of a teacher's targets", "name another folder")
        return
    lineage = read_lineage(folder)
    if stage and (made_by := lineage.get("stage") or stage) != stage:
        rule = f"holds a checkpoint that `{made_by}` made, not `{stage}`"
        raise InputError(key, folder, rule, "name another folder")
    stored = read_mapping(stored_file)
    beside = folder / SOURCES
    recorded = read_mapping(beside) if beside.is_file() else lineage.get("sources", {})
    entries = {entry.name: entry for entry in dataclasses.fields(Recipe)}
    for section in filter(stored.__contains__, (*sections, "seed", "precision")):
        for entry, path, there, here in _values(entries[section], stored[section], getattr(recipe, section)):
            in_budget = entry.metadata["budget"] and section == stage and not keeps_budget
            if entry.metadata["may_change"] or in_budget or _is_same(entry, path, there, here, recorded):
                continue
            phases = f"; to change it on the way, give {stage}.phases"
            hint = phases if stage and not keeps_budget and entry.name in PHASED else ""
            rule = f"holds another run: {path} is {shown(there)} there and {shown(here)} here"
            raise InputError(key, folder, rule, f"name another folder, or delete that one{hint}")
    if stage is not None and not keeps_budget:
        refuse_other_budget(folder, recipe, stored, stage, chats)


def sources(recipe: Recipe, made: Path | None = None) -> dict[str, Any]:
    """By key, what identifies the data and checkpoints that the recipe reads, wherever they lie. made: the folder that
    is written, which a step of `run` may name as what later ones read."""
    found = {}
    for section in dataclasses.fields(Recipe):
        value = getattr(recipe, section.name)
        for entry in dataclasses.fields(value) if section_of(section.type) else ():
            path = f"{section.name}.{entry.name}"
            if _names_files(entry) and not entry.metadata["may_change"]:
                _, places = _places(path, getattr(value, entry.name))
                if made is not None and os.path.realpath(made) in places:
                    continue
                if (held := [mark_of(place) for place in places]) and None not in held:
                    found[path] = held
    return found


def identity_of(recipe: Recipe, sections: tuple[str, ...], read: dict[str, Any]) -> str:
    """A checksum of what `refuse_other_run` compares of a recipe, of its budget, and of the files that it reads, as
    `sources` gives them."""
    entries, said = {entry.name: entry for entry in dataclasses.fields(Recipe)}, []
    for section in (*sections, "seed", "precision"):
        here = getattr(recipe, section)
        there = dataclasses.asdict(here) if section_of(entries[section].type) else here
        for entry, path, value, _ in sorted(_values(entries[section], there, here), key=lambda each: each[1]):
            if not entry.metadata["may_change"] and path not in read:
                said.append((path, _settled(entry, value)))
    return xxhash.xxh3_128_hexdigest(repr((said, sorted(read.items()))).encode())


def mark_of(place: str) -> str | None:
    """What tells the checkpoint, the data or the file at a path from another, wherever it lies; None: nothing there."""
    if os.path.isfile(place + ".idx") and os.path.isfile(place + ".bin"):
        return f"{_sampled(place + '.idx')}-{_sampled(place + '.bin')}"
    if os.path.isfile(place):
        return _sampled(place)
    try:
        folder, iteration = find_checkpoint(place, "")
    except InputError:
        return None
    manifest = iteration_folder(folder, iteration) / "manifest.json"
    return f"{iteration}-{_sampled(str(manifest))}" if manifest.is_file() else None


def _sampled(path: str) -> str:
    """Size and checksum of a file; of a large one 64 windows of 64 KiB stand for the rest."""
    size, digest = os.path.getsize(path), xxhash.xxh3_128()
    count = min(_WINDOWS, -(-size // _WINDOW))
    with open(path, "rb") as stream:
        for number in range(count):
            stream.seek(number * max(size - _WINDOW, 0) // max(count - 1, 1))
            digest.update(stream.read(_WINDOW))
    return f"{size}-{digest.hexdigest()}"


def _values(entry: Any, there: Any, here: Any) -> list[tuple[Any, str, Any, Any]]:
    """(key, its path, stored value, value now) of a section's keys, or of a key that is no section."""
    if section_of(entry.type) is None:
        return [(entry, entry.name, there, here)]
    if not there:
        return []
    # A key that an older version did not have was then as it is by default now.
    before, now = {**dataclasses.asdict(type(here)()), **there}, dataclasses.asdict(here)
    for name, meant in LEFT_OUT.items() if entry.name == "model" else ():
        # What a key that is left out means once stood there as its default.
        before[name], now[name] = (meant if said[name] is None else said[name] for said in (before, now))
    return [
        (each, f"{entry.name}.{each.name}", before[each.name], now[each.name])
        for each in sorted(dataclasses.fields(here), key=lambda each: each.name not in there)
    ]


def _is_same(entry: Any, path: str, there: Any, here: Any, recorded: dict[str, Any]) -> bool:
    if there == here or _settled(entry, there) == _settled(entry, here):
        return True
    if not _names_files(entry) or there is None or here is None:
        return False
    if path == "distill.teacher":  # a cache is known by what it holds, which is checked when it is opened
        return all(str(value).startswith(CACHE) for value in (there, here))
    (weights, places), (other_weights, others) = _places(path, there), _places(path, here)
    if weights != other_weights or places == others:
        return weights == other_weights
    held = [mark_of(place) for place in others]
    return None not in held and held == (recorded.get(path) or [mark_of(place) for place in places])


def _names_files(entry: Any) -> bool:
    return any(map(is_path, options_of(entry.type)))


def _places(path: str, value: Any) -> tuple[list[float], list[str]]:
    """The weights of a blend, and the absolute paths of what a key names, links resolved; of data without an ending."""
    is_data = path.startswith("data.")
    if isinstance(value, str):
        value = value.split() if is_data and not os.path.exists(value + ".idx") else [value]
    weights, places = [], []
    for item in value or []:
        if is_data and (weight := as_number(str(item))) is not None:
            weights.append(weight)
        else:
            place = os.path.realpath(os.path.expanduser(str(item)))
            places.append(place[:-4] if is_data and place.endswith((".bin", ".idx")) else place)
    return weights, places


def _settled(entry: Any, value: Any) -> Any:
    """A list of sections without those of their keys that may change, as the micro-batch sizes of phases."""
    inner = entry_of(entry.type)
    if not dataclasses.is_dataclass(inner) or not isinstance(value, list):
        return value
    kept = [each.name for each in dataclasses.fields(inner) if not each.metadata["may_change"]]
    return [[part.get(name) for name in kept] for part in value]


def refuse_other_budget(
    folder: Path, recipe: Recipe, stored: dict[str, Any], section: str, chats: Chats | None = None
) -> None:
    """Raise InputError where a run in `folder`, of the recipe `stored`, cannot go on to the budget of `section`. Where
    that depends on how many samples there are, nothing is refused before they are prepared."""
    iteration = resumed_iteration(folder)
    if iteration is None or section not in stored:
        return
    train: TrainConfig = getattr(recipe, section)
    now = dataclasses.asdict(train)
    budget = [entry.name for entry in dataclasses.fields(train) if entry.metadata["budget"]]
    fields = {name: stored[section].get(name, now[name]) for name in budget}
    if all(now[name] == value for name, value in fields.items()):
        return
    fields["phases"] = [PhaseConfig(**phase) for phase in fields["phases"]]
    before, length = dataclasses.replace(train, **fields), recipe.data.sequence_length
    named = budget_of(before), budget_of(train)
    if chats is not None:
        if not chats.samples.prepared and not (before.tokens and train.tokens):
            return
        before, train = (budget_in_tokens(each, chats.samples) for each in (before, train))
        length = chats.samples.row_length
    check_continuation((before, length), (train, length), iteration, section, named)


def read_so_far(before: Mapping[str, Any], model: Model, key: str, folder: Path | str, does: str, noun: str) -> int:
    """The iteration of `model` that the run in `folder`, of the recipe's `key`, has read so far; its newest where that
    is not said.

    before: what that run's lineage says: `iteration`, and `weights`, as `identify_weights` gives them. does, noun: what
    the run does with the model, and what it calls it, for the error. Raises InputError where that iteration is not
    there any more, or has changed.
    """
    _, newest = model.place
    if "iteration" not in before:
        return newest
    iteration, named = int(before["iteration"]), f"in {model.key}={model.folder}"
    is_there = iteration_folder(model.folder, iteration).is_dir()
    if is_there and before.get("weights") in (None, identify_weights(model.folder, iteration)["weights"]):
        return iteration
    wrong = f"has other weights {named}" if is_there else f"is not {named}, where the newest is {newest}"
    rule = f"{does} iteration {iteration} of its {noun}, which {wrong}"
    raise InputError(key, folder, rule, f"name or restore that {noun}, or name another folder")
