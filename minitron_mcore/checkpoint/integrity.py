"""Reads every stored byte again and compares it with the manifest, one tensor in memory at a time. Writes nothing.

A folder without a manifest (from elsewhere, or of an older version) is read all the same, to find what cannot be read;
a `note` says that there was nothing to compare its bytes with.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from minitron_mcore.checkpoint.folder import find_checkpoint, iteration_folder
from minitron_mcore.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    bytes_checksum,
    file_faults,
    read_manifest,
    stored_piece,
)
from minitron_mcore.checkpoint.reader import TensorReader, load_piece
from minitron_mcore.checkpoint.safetensors_file import SafetensorsFile
from minitron_mcore.errors import InputError
from minitron_mcore.files import not_read
from minitron_mcore.runtime.progress import SILENT, Progress

Name = tuple[str, tuple[int, ...]]  # of a stored piece: its key, and where in the tensor it begins


class Verification:
    """What was read in a folder, one sentence for each fault, naming file and tensor, and what could not be checked.

    `num_bytes`, `faults`, `notes`, and `keys`, those of the tensors.
    """

    def __init__(self, folder: Path, *, files: bool = True) -> None:
        """files: the small files, and the sizes of all, are compared here."""
        self.folder, self.keys, self.num_bytes = folder, set[str](), 0
        self.faults: list[str] = []
        self.notes: list[str] = []
        self.manifest: Manifest | None = None
        self.left: set[Name] = set()  # named there, and not found yet
        try:
            self.manifest = read_manifest(folder)
        except InputError as error:
            self.failed(error)
            return
        if self.manifest is None:
            note = f"{folder} has no {MANIFEST}: its tensors were read, but there was nothing to compare them with"
            self.notes.append(note)
        else:
            self.faults += file_faults(folder, self.manifest) if files else []
            self.left.update(self.manifest.pieces)

    def failed(self, error: InputError) -> Verification:
        """What cannot be read at all is one fault: nothing is said of what should be in it."""
        self.faults.append(str(error))
        self.left.clear()
        return self

    def look(self, path: Path, name: Name, read: Callable[[], torch.Tensor]) -> None:
        """At a piece of the file `path`, which is in memory no longer than that."""
        self.left.discard(name)
        self.keys.add(name[0])
        try:
            tensor = read()
        except Exception as error:  # torch.load may raise anything on damaged data
            damage = f"{path} is damaged: {_shown(name)} cannot be read: {' '.join(str(error).split())}"
            self.faults.append(str(error) if isinstance(error, InputError) else damage)
            return
        self.num_bytes += tensor.nbytes
        if self.manifest is None:
            return
        found, written = stored_piece(*name, tensor), self.manifest.pieces.get(name)
        if written is None:
            self.faults.append(f"{path} holds {_shown(name)}, which {MANIFEST} does not name")
        elif (found.dtype, found.shape) != (written.dtype, written.shape):
            here, there = (f"{piece.dtype} of shape {piece.shape}" for piece in (found, written))
            self.faults.append(f"{path}: {_shown(name)} is {here}, where {MANIFEST} says {there}")
        elif found != written:
            self._changed(path, _shown(name))

    def look_at_object(self, path: Path, key: str, info: Any) -> None:
        if self.manifest and bytes_checksum(path, info.offset, info.length) != self.manifest.objects.get(key):
            self._changed(path, key)

    def _changed(self, path: Path, what: str) -> None:
        self.faults.append(f"{path}: {what} has changed since it was written: its checksum differs")

    def finish(self) -> Verification:
        missing = [f"{self.folder} holds no {_shown(name)}, though {MANIFEST} names it" for name in sorted(self.left)]
        self.faults += missing
        return self


def verify_checkpoint(folder: Path, progress: Progress = SILENT) -> Verification:
    """The newest finished iteration of a checkpoint, or the iteration that `folder` is. One process calls.

    Raises InputError if there is no finished iteration.
    """
    path, iteration = find_checkpoint(folder, "path")
    found = Verification(iteration_folder(path, iteration))
    return _read_again(found, path, iteration, progress).finish()


def damaged_files(iteration: Path) -> list[str]:
    """What is missing, of another size, or, but for weights, changed in the folder of an iteration, one sentence each.
    What it has no manifest for is not known."""
    if not (iteration / "metadata.json").is_file():
        missing = iteration / "metadata.json" if iteration.is_dir() else iteration
        return [f"{missing} is missing"]
    try:
        return Verification(iteration).faults
    except OSError as error:
        return [str(not_read(str(iteration), error))]


def damaged_pieces(iteration: Path, share: tuple[int, int], progress: Progress = SILENT) -> list[str]:
    """What is damaged of the tensors in the folder of an iteration, whose files are as long as they should be, one
    sentence each.

    share: (number, of how many): of the files that as many ranks wrote, those that the rank of this number did.
    """
    found, (number, of) = Verification(iteration, files=False), share
    try:
        _read_again(found, iteration, 0, progress, lambda name: _writer(name) % of == number)
    except OSError as error:
        found.failed(not_read(str(iteration), error))
    return found.finish().faults if of == 1 else found.faults


def _writer(file: str) -> int:
    """The rank in `__3_0.distcp`; 0 where none is said."""
    rank = file.removeprefix("__").partition("_")[0]
    return int(rank) if rank.isdecimal() else 0


def _read_again(
    found: Verification,
    path: Path,
    iteration: int,
    progress: Progress,
    is_mine: Callable[[str], bool] = lambda name: True,
) -> Verification:
    """Everything that is stored in the files of the iteration that are `is_mine`, by their names."""
    place = iteration_folder(path, iteration)
    try:
        reader = TensorReader(path, iteration)
    except InputError as error:
        return found.failed(error)
    stored: dict[MetadataIndex, Any] = reader.metadata.storage_data
    rows = [row for row in stored.items() if is_mine(row[1].relative_path)]
    absent = {name for name in {info.relative_path for _, info in rows} if not (place / name).is_file()}
    if found.manifest is None:
        found.faults += [f"{place / name} is missing, though .metadata names it" for name in sorted(absent)]
    rows.sort(key=lambda row: (row[1].relative_path, row[1].offset))
    with progress(sum(info.length for _, info in rows), "B", "verify") as bar:
        for index, info in bar.over(rows, lambda row: row[1].length):
            file, name = place / info.relative_path, (index.fqn, tuple(index.offset or ()))
            if info.relative_path in absent:
                found.left.discard(name)
            elif index.fqn in reader.tensors:
                found.look(file, name, partial(load_piece, place, info))
            else:
                found.look_at_object(file, index.fqn, info)
    return found


def verify_hugging_face(folder: Path, progress: Progress = SILENT) -> Verification:
    """Every tensor of every safetensors file of a Hugging Face folder. One process calls."""
    found = Verification(folder)
    if found.faults:
        found.left.clear()  # a file's own fault says enough
    paths = sorted(folder.glob("*.safetensors"))
    with progress(sum(path.stat().st_size for path in paths), "B", "verify") as bar:
        for path in bar.over(paths, lambda path: path.stat().st_size):
            try:
                file = SafetensorsFile(path)
            except InputError as error:
                found.failed(error)
                continue
            for name in file.tensors:
                found.look(path, (name, ()), partial(file.read, name))
    return found.finish()


def _shown(name: Name) -> str:
    """`decoder.layers.mlp.linear_fc2.weight`, or the same `from (3, 0, 1024) on` for a part of it."""
    key, offsets = name
    return f"{key} from {offsets} on" if any(offsets) else key
