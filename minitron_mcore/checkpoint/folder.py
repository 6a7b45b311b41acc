"""A checkpoint's folder: what lies beside the weights, and when an iteration counts as finished.

DIR/architecture.yaml                     what the model is
DIR/tokenizer/                            the tokenizer it was trained with
DIR/hugging_face/                         what lay beside the imported weights (companions.py)
DIR/recipe.yaml                           the recipe that made it, resolved
DIR/lineage.yaml                          where it comes from: teacher, plan, data
DIR/iter_0000100/                         weights (and optimizer), in Megatron's torch_dist form, with what other
                                          projects need to load them (way_back.py) and a copy of architecture.yaml
DIR/latest_checkpointed_iteration.txt     written last, once the iteration is whole
DIR/best -> iter_0000100                  the one with the lowest validation loss, where a training keeps it (kept.py)

Other projects on megatron-core write only the last two; their own files in the iteration then describe the model
(foreign.py). An iteration's folder may be named instead of DIR, such as one that was copied alone. Pure.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture, load_architecture, save_architecture
from minitron_mcore.checkpoint.foreign import description_file, infer_architecture
from minitron_mcore.checkpoint.manifest import MANIFEST, WEIGHT_FILES, bytes_checksum
from minitron_mcore.errors import InputError
from minitron_mcore.files import as_yaml, read_mapping, reading, refuse_closed, sync_small, write_whole

TRACKER = "latest_checkpointed_iteration.txt"
BEST = "best"


def iteration_folder(folder: Path, iteration: int) -> Path:
    """Where to read an iteration of the checkpoint `folder`."""
    return folder if is_iteration(folder) else folder / _name(iteration)


def _name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def unfinished_folder(folder: Path, iteration: int) -> Path:
    """Where an iteration of `folder` lies while it is written."""
    return folder / f".unfinished_{_name(iteration)}"


def is_iteration(folder: Path) -> bool:
    """Whether `folder` is itself a finished iteration rather than a folder of them."""
    return (folder / "metadata.json").is_file() and not (folder / TRACKER).exists()


def beside(folder: Path, name: str) -> Path:
    """Where the file `name` beside the weights of `folder` lies: in it, or in its parent if it is an iteration."""
    return folder.parent / name if is_iteration(folder) and (folder.parent / name).exists() else folder / name


def latest_iteration(folder: Path) -> int | None:
    """Newest finished iteration in `folder`; None if there is none.

    Raises InputError if the tracker names an iteration that is not whole.
    """
    tracker = folder / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if not text.isdecimal():
        remedy = "write that of the newest finished iteration into it"
        raise InputError("", tracker, f"reads {text!r} instead of a number", remedy)
    iteration = int(text)
    if not (iteration_folder(folder, iteration) / "metadata.json").is_file():
        rule = f"names iteration {iteration}, but {iteration_folder(folder, iteration)} is not a finished checkpoint"
        raise InputError("", tracker, rule, "restore it, or write the number of a finished one into the file")
    return iteration


def finished_iterations(folder: Path) -> list[int]:
    """The finished iterations in `folder`, in their order: as far as the tracker says, where there is one that can be
    read. Which of them are whole is not looked at."""
    return [each for each in _counted(folder) if (iteration_folder(folder, each) / "metadata.json").is_file()]


def unfinished_iterations(folder: Path) -> list[int]:
    """Those that are being written to `folder`, or dropped, or that a process has left so."""
    names = [path.name.rpartition("_")[2] for path in folder.glob(".unfinished_iter_*")]
    return sorted(int(name) for name in names if name.isdecimal())


def resumable_iterations(folder: Path) -> list[int]:
    """Those from which a run in `folder` may go on, if they are whole, the newest first; that which the tracker names
    is one, there or not. Raises InputError where there are none, and a tracker that cannot be read."""
    newest = _tracked(folder)
    found = {*_counted(folder)} | ({newest} if newest is not None else set())
    if not found:
        latest_iteration(folder)
    return sorted(found, reverse=True)


def resumed_iteration(folder: Path) -> int | None:
    """The newest of `folder` from which a run may go on, as far as names tell; None where there is none. Raises
    InputError where none of those that should be there is."""
    candidates, finished = resumable_iterations(folder), finished_iterations(folder)
    if candidates and not finished:
        place = iteration_folder(folder, candidates[0])
        rule = f"holds no checkpoint that is whole: {place / 'metadata.json'} is missing"
        raise InputError("", folder, rule, "restore one, or name another folder to begin anew")
    return finished[-1] if finished else None


def mark_newest(folder: Path, iteration: int) -> None:
    """Have the tracker name `iteration`. One rank calls."""
    write_whole(folder / TRACKER, str(iteration))


def _counted(folder: Path) -> list[int]:
    names = [path.name.removeprefix("iter_") for path in folder.glob("iter_*")]
    newest = _tracked(folder)
    return sorted(int(name) for name in names if name.isdecimal() and (newest is None or int(name) <= newest))


def _tracked(folder: Path) -> int | None:
    """The number in the tracker; None where it has none, or is not there."""
    try:  # another process may delete it at any moment
        text = (folder / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    return int(text) if text.isdecimal() else None


def find_checkpoint(folder: str | Path | None, key: str) -> tuple[Path, int]:
    """(folder, newest iteration) of a checkpoint that must be there; `key` is the recipe's key for messages.

    Raises InputError if there is none, or if this user may not read it.
    """
    if not folder:
        raise InputError(key, None, "is not given", "name the folder of a checkpoint")
    path = Path(folder)
    with reading(f"{key}={path}"):
        if not path.is_dir():
            rule = "is a file" if path.is_file() else "is not there"
            raise InputError(key, path, rule, "name the folder of a checkpoint")
        found, iteration = _find(path, key)
        place = iteration_folder(found, iteration)
        besides = [beside(found, name) for name in ("architecture.yaml", "lineage.yaml", "tokenizer")]
        # Not each of what may be thousands of weight files: reading one reports what is wrong with it.
        for part in (*besides, place, place / ".metadata", place / "common.pt"):
            refuse_closed(f"{key}={path}", part)
    return found, iteration


def _find(path: Path, key: str) -> tuple[Path, int]:
    path = released(path)
    if is_iteration(path):
        number = path.resolve().name.removeprefix("iter_")
        return path, int(number) if number.isdecimal() else 0
    iteration = latest_iteration(path)
    if iteration is not None:
        return path, iteration
    if within := checkpoints_within(path):
        remedy = f"name one of the checkpoints in it, {', '.join(map(str, within))}"
        raise InputError(key, path, "is not a checkpoint itself", remedy)
    if is_hugging_face(path):
        remedy = f"convert it first with `minitron import hf={path} checkpoint=DIR`, then give {key}=DIR"
        raise InputError(key, path, "is a Hugging Face folder, not a Megatron checkpoint", remedy)
    raise InputError(key, path, f"holds no finished checkpoint: {TRACKER} is missing")


def is_hugging_face(folder: Path) -> bool:
    """Also one whose config is missing, but not a run's, where scores are such a file."""
    weights = (path for path in folder.glob("*.safetensors") if not path.stem.startswith("scores"))
    return (folder / "config.json").is_file() or any(weights)


def checkpoints_within(folder: Path) -> list[Path]:
    """Checkpoints in sub-folders, as deep as a run puts them."""
    found = [tracker.parent for depth in ("*", "*/*", "*/*/*") for tracker in folder.glob(f"{depth}/{TRACKER}")]
    return sorted(found)


def released(folder: Path) -> Path:
    """`folder`, or its sub-folder `release` if its tracker says so, as Megatron-LM's converters write it."""
    tracker = folder / TRACKER
    is_release = tracker.is_file() and tracker.read_bytes().strip() == b"release"
    return folder / "release" if is_release and is_iteration(folder / "release") else folder


def read_architecture(folder: Path) -> Architecture:
    """The model in `folder`, from architecture.yaml, else from another project's files in its newest iteration.

    Raises InputError if nothing describes it, if the stored tensors contradict it, or if this user may not read it.
    """
    with reading(str(folder)):
        described, foreign = _description(folder)
        return load_architecture(described) if foreign is None else infer_architecture(foreign)


def check_architecture(folder: Path, architecture: Architecture) -> None:
    """Raise InputError, naming the first field, where the checkpoint in `folder` is of another architecture."""
    if difference := architecture.difference(read_architecture(folder)):
        raise InputError("", folder, f"is a checkpoint of another architecture: {difference}", "name another folder")


def said_by(folder: Path) -> str:
    """The file that `read_architecture` reads, for messages."""
    described, foreign = _description(folder)
    return str(described if foreign is None else description_file(foreign))


def _description(folder: Path) -> tuple[Path, Path | None]:
    """architecture.yaml, and, where it is missing, the iteration whose own files count instead, if there is one."""
    described = beside(folder, "architecture.yaml")
    if described.is_file():
        return described, None
    newest = 0 if is_iteration(folder) else latest_iteration(folder)  # of an iteration's own folder any number gives it
    return described, None if newest is None else iteration_folder(folder, newest)


def write_description(
    folder: Path,
    architecture: Architecture,
    *,
    lineage: dict[str, Any],
    recipe: str,
    save_tokenizer: Callable[[str], None] | None,
) -> None:
    """Write what lies beside the weights. One rank calls; `save_tokenizer` is `Tokenizer.save`, if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    save_architecture(architecture, folder / "architecture.yaml")
    write_whole(folder / "recipe.yaml", recipe)
    write_whole(folder / "lineage.yaml", as_yaml(lineage))
    if save_tokenizer is not None:
        save_tokenizer(str(folder / "tokenizer"))


def read_lineage(folder: Path) -> dict[str, Any]:
    path = beside(folder, "lineage.yaml")
    return read_mapping(path) if path.is_file() else {}


def tokenizer_folder(folder: Path) -> Path | None:
    """The folder of the tokenizer beside a checkpoint; None if there is none."""
    target = beside(folder, "tokenizer")
    return target if target.is_dir() else None


def finish_iteration(folder: Path, temporary: Path, iteration: int) -> None:
    """Publish a fully written iteration: rename it into place, then update the tracker. One rank calls.

    What the ranks wrote is on its disk by then (megatron-core syncs it), and so is the rest: another iteration may be
    dropped for this one.
    """
    sync_small(temporary, but=WEIGHT_FILES)
    target = folder / _name(iteration)
    if target.exists():
        shutil.rmtree(target)
    os.replace(temporary, target)
    mark_newest(folder, iteration)


def identify_weights(folder: Path, iteration: int) -> dict[str, Any]:
    """Which weights an iteration holds, wherever it lies: its number, and the checksum of the manifest of its tensors;
    None where there is no manifest."""
    manifest = iteration_folder(folder, iteration) / MANIFEST
    return {"iteration": iteration, "weights": bytes_checksum(manifest) if manifest.is_file() else None}


def drop_iteration(folder: Path, iteration: int) -> None:
    """Delete an iteration that is not the newest; one that is half gone counts as unfinished. One rank calls."""
    going, best = unfinished_folder(folder, iteration), folder / BEST
    shutil.rmtree(going, ignore_errors=True)
    with suppress(OSError):  # nothing is to be left that leads nowhere
        if os.readlink(best) == _name(iteration):
            best.unlink()
    with suppress(OSError):  # it is in nobody's way
        os.replace(folder / _name(iteration), going)
    shutil.rmtree(going, ignore_errors=True)


def drop_every_iteration(folder: Path) -> None:
    """Delete all checkpoints in `folder`; what lies beside them stays. One rank calls."""
    for iteration in _counted(folder)[:-1]:
        drop_iteration(folder, iteration)
    (folder / TRACKER).unlink(missing_ok=True)
    for iteration in _counted(folder):
        drop_iteration(folder, iteration)
