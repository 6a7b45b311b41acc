"""Reads every stored byte again and compares it with the manifest, one tensor in memory at a time. Writes nothing.

A folder without a manifest (from elsewhere, or of an older version) is read all the same, to find what cannot be read;
a `note` says that there was nothing to compare its bytes with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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

Name = tuple[str, tuple[int, ...]]  # of a stored piece: its key, and where in the tensor it begins


@dataclass
class Verification:
    """What was read, one sentence for each fault, naming file and tensor, and what could not be checked."""

    tensors: int = 0
    num_bytes: int = 0
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify_checkpoint(folder: Path) -> Verification:
    """The newest finished iteration of a checkpoint, or the iteration that `folder` is. One process calls.

    Raises InputError if there is no finished iteration.
    """
    path, iteration = find_checkpoint(folder, "path")
    place = iteration_folder(path, iteration)
    comparison = _Comparison(place)
    try:
        reader = TensorReader(path, iteration)
    except InputError as error:
        return comparison.failed(error)
    stored: dict[MetadataIndex, Any] = reader.metadata.storage_data
    absent = {name for name in {info.relative_path for info in stored.values()} if not (place / name).is_file()}
    if comparison.manifest is None:
        comparison.result.faults += [f"{place / name} is missing, though .metadata names it" for name in sorted(absent)]
    for index, info in sorted(stored.items(), key=lambda row: (row[1].relative_path, row[1].offset)):
        file, name = place / info.relative_path, (index.fqn, tuple(index.offset or ()))
        if info.relative_path in absent:
            comparison.left.discard(name)
        elif index.fqn in reader.tensors:
            comparison.look(file, name, partial(load_piece, place, info))
        else:
            comparison.look_at_object(file, index.fqn, info)
    return comparison.finish()


def verify_hugging_face(folder: Path) -> Verification:
    """Every tensor of every safetensors file of a Hugging Face folder. One process calls."""
    comparison = _Comparison(folder)
    if comparison.result.faults:
        comparison.left.clear()  # a file's own fault says enough
    for path in sorted(folder.glob("*.safetensors")):
        try:
            file = SafetensorsFile(path)
        except InputError as error:
            comparison.failed(error)
            continue
        for name in file.tensors:
            comparison.look(path, (name, ()), partial(file.read, name))
    return comparison.finish()


class _Comparison:
    """Of what is read in a folder with its manifest, if it has one."""

    def __init__(self, folder: Path) -> None:
        """The small files and the files' sizes are compared here."""
        self.folder, self.result, self.keys = folder, Verification(), set[str]()
        self.manifest: Manifest | None = None
        self.left: set[Name] = set()  # named there, and not found yet
        try:
            self.manifest = read_manifest(folder)
        except InputError as error:
            self.failed(error)
            return
        if self.manifest is None:
            note = f"{folder} has no {MANIFEST}: its tensors were read, but there was nothing to compare them with"
            self.result.notes.append(note)
        else:
            self.result.faults += file_faults(folder, self.manifest)
            self.left.update(self.manifest.pieces)

    def failed(self, error: InputError) -> Verification:
        """What cannot be read at all is one fault: nothing is said of what should be in it."""
        self.result.faults.append(str(error))
        self.left.clear()
        return self.result

    def look(self, path: Path, name: Name, read: Callable[[], torch.Tensor]) -> None:
        """At a piece of the file `path`, which is in memory no longer than that."""
        self.left.discard(name)
        self.keys.add(name[0])
        try:
            tensor = read()
        except Exception as error:  # torch.load may raise anything on damaged data
            damage = f"{path} is damaged: {_shown(name)} cannot be read: {' '.join(str(error).split())}"
            self.result.faults.append(str(error) if isinstance(error, InputError) else damage)
            return
        self.result.num_bytes += tensor.nbytes
        if self.manifest is None:
            return
        found, written = stored_piece(*name, tensor), self.manifest.pieces.get(name)
        if written is None:
            self.result.faults.append(f"{path} holds {_shown(name)}, which {MANIFEST} does not name")
        elif (found.dtype, found.shape) != (written.dtype, written.shape):
            here, there = (f"{piece.dtype} of shape {piece.shape}" for piece in (found, written))
            self.result.faults.append(f"{path}: {_shown(name)} is {here}, where {MANIFEST} says {there}")
        elif found != written:
            self._changed(path, _shown(name))

    def look_at_object(self, path: Path, key: str, info: Any) -> None:
        if self.manifest and bytes_checksum(path, info.offset, info.length) != self.manifest.objects.get(key):
            self._changed(path, key)

    def _changed(self, path: Path, what: str) -> None:
        self.result.faults.append(f"{path}: {what} has changed since it was written: its checksum differs")

    def finish(self) -> Verification:
        missing = [f"{self.folder} holds no {_shown(name)}, though {MANIFEST} names it" for name in sorted(self.left)]
        self.result.faults += missing
        self.result.tensors = len(self.keys)
        return self.result


def _shown(name: Name) -> str:
    """`decoder.layers.mlp.linear_fc2.weight`, or the same `from (3, 0, 1024) on` for a part of it."""
    key, offsets = name
    return f"{key} from {offsets} on" if any(offsets) else key
