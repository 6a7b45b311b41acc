"""A checkpoint's folder: what lies beside the weights, and when an iteration counts as finished.

DIR/architecture.yaml                     what the model is
DIR/tokenizer/                            the tokenizer it was trained with
DIR/hugging_face/                         what lay beside the imported weights (companions.py)
DIR/recipe.yaml                           the recipe that made it, resolved
DIR/lineage.yaml                          where it comes from: teacher, plan, data
DIR/iter_0000100/                         weights (and optimizer), in Megatron's torch_dist form, with what other
                                          projects need to load them (way_back.py) and a copy of architecture.yaml
DIR/latest_checkpointed_iteration.txt     written last, once the iteration is whole

Other projects on megatron-core write the last two alone; what the model is then follows from what lies in the
iteration (foreign.py). An iteration's folder may be named instead of DIR, as one that was copied alone. Pure.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from minitron_mcore.architecture import Architecture, load_architecture, save_architecture
from minitron_mcore.checkpoint.foreign import description_file, infer_architecture
from minitron_mcore.errors import InputError
from minitron_mcore.files import read_mapping, reading, refuse_closed, write_whole

TRACKER = "latest_checkpointed_iteration.txt"


def iteration_folder(folder: Path, iteration: int) -> Path:
    """Where to read an iteration of the checkpoint `folder`."""
    return folder if is_iteration(folder) else folder / _name(iteration)


def _name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def unfinished_folder(folder: Path, iteration: int) -> Path:
    """Where an iteration of `folder` lies while it is written."""
    return folder / f".unfinished_{_name(iteration)}"


def is_iteration(folder: Path) -> bool:
    """Whether `folder` is itself a finished iteration, not the folder of several."""
    return (folder / "metadata.json").is_file() and not (folder / TRACKER).exists()


def beside(folder: Path, name: str) -> Path:
    """Where `name` lies that describes the checkpoint `folder`: in it, or in its parent where it is an iteration."""
    return folder.parent / name if is_iteration(folder) and (folder.parent / name).exists() else folder / name


def latest_iteration(folder: Path) -> int | None:
    """Newest finished iteration in `folder`; None where there is none.

    Raises InputError where the tracker names an iteration that is not whole.
    """
    tracker = folder / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if not text.isdecimal():
        raise InputError(f"{tracker} reads {text!r}: a whole number, the newest finished iteration, belongs there")
    iteration = int(text)
    if not (iteration_folder(folder, iteration) / "metadata.json").is_file():
        raise InputError(
            f"{tracker} names iteration {iteration}, but {iteration_folder(folder, iteration)} is not a finished "
            "checkpoint: restore it, or write the number of a finished one into the file"
        )
    return iteration


def find_checkpoint(folder: str | Path | None, key: str) -> tuple[Path, int]:
    """(folder, newest iteration) of a checkpoint that must be there; `key` is the recipe's key for messages.

    Raises InputError where there is none, or where what lies there is closed to this user.
    """
    if not folder:
        raise InputError(f"{key} is not given: name the folder of a checkpoint")
    path = Path(folder)
    with reading(f"{key}={path}"):
        if not path.is_dir():
            raise InputError(f"{key}={path} is not there: name the folder of a checkpoint")
        found, iteration = _find(path, key)
        place = iteration_folder(found, iteration)
        besides = [beside(found, name) for name in ("architecture.yaml", "lineage.yaml", "tokenizer")]
        # Not every file of weights, of which there may be thousands: who reads one says what is wrong with it.
        for part in (*besides, place, place / ".metadata", place / "common.pt"):
            refuse_closed(f"{key}={path}", part)
    return found, iteration


def _find(path: Path, key: str) -> tuple[Path, int]:
    path = released(path)
    if is_iteration(path):
        number = path.resolve().name.removeprefix("iter_")
        return path, int(number) if number.isdecimal() else 0
    iteration = latest_iteration(path)
    if iteration is None:
        raise InputError(f"{key}={path} holds no finished checkpoint: {TRACKER} is missing")
    return path, iteration


def released(folder: Path) -> Path:
    """Its sub-folder `release`, as Megatron-LM's converters name what has no iteration, where `folder` has that; else
    `folder`."""
    tracker = folder / TRACKER
    is_release = tracker.is_file() and tracker.read_bytes().strip() == b"release"
    return folder / "release" if is_release and is_iteration(folder / "release") else folder


def read_architecture(folder: Path) -> Architecture:
    """The model in `folder`: as architecture.yaml says, else as another project's files in its newest iteration.

    Raises InputError where nothing says it, where the stored tensors contradict it, or where it is closed to this user.
    """
    with reading(str(folder)):
        if (described := beside(folder, "architecture.yaml")).is_file():
            return load_architecture(described)
        place = _newest(folder)
        return load_architecture(described) if place is None else infer_architecture(place)


def check_architecture(folder: Path, architecture: Architecture) -> None:
    """Raise InputError, naming the first field, where the checkpoint in `folder` is of another architecture."""
    stored = read_architecture(folder).to_dict()
    for field, value in architecture.to_dict().items():
        if stored[field] != value and field != "init_method_std":
            rule = f"is a checkpoint of another architecture: {field} is {stored[field]} there and {value} here"
            raise InputError("", folder, rule, "name another folder")


def said_by(folder: Path) -> str:
    """The file that `read_architecture` reads, for messages."""
    described = beside(folder, "architecture.yaml")
    place = None if described.is_file() else _newest(folder)
    return str(described if place is None else description_file(place))


def _newest(folder: Path) -> Path | None:
    if is_iteration(folder):
        return folder
    newest = latest_iteration(folder)
    return None if newest is None else iteration_folder(folder, newest)


def write_description(
    folder: Path,
    architecture: Architecture,
    *,
    lineage: dict[str, Any],
    recipe: str,
    save_tokenizer: Callable[[str], None] | None,
) -> None:
    """Write what lies beside the weights. One rank calls; `save_tokenizer` is `Tokenizer.save`, where there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    save_architecture(architecture, folder / "architecture.yaml")
    write_whole(folder / "recipe.yaml", recipe)
    write_whole(folder / "lineage.yaml", yaml.safe_dump(lineage, sort_keys=False))
    if save_tokenizer is not None:
        save_tokenizer(str(folder / "tokenizer"))


def read_lineage(folder: Path) -> dict[str, Any]:
    path = beside(folder, "lineage.yaml")
    return read_mapping(path) if path.is_file() else {}


def tokenizer_folder(folder: Path) -> Path | None:
    """The tokenizer that lies beside a checkpoint; None where there is none."""
    target = beside(folder, "tokenizer")
    return target if target.is_dir() else None


def finish_iteration(folder: Path, temporary: Path, iteration: int) -> None:
    """Make a fully written iteration count: rename it into place, then move the tracker on. One rank calls."""
    target = folder / _name(iteration)
    if target.exists():
        shutil.rmtree(target)
    os.replace(temporary, target)
    write_whole(folder / TRACKER, str(iteration))


def drop_iteration(folder: Path, iteration: int) -> None:
    """Take away an iteration that is not the newest; one that is half gone counts as unfinished. One rank calls."""
    going = unfinished_folder(folder, iteration)
    shutil.rmtree(going, ignore_errors=True)
    with suppress(OSError):  # it is in nobody's way
        os.replace(folder / _name(iteration), going)
    shutil.rmtree(going, ignore_errors=True)
