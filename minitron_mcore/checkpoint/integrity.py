"""Reads every stored byte again and compares it with the manifest, one tensor in memory at a time. Writes nothing.

A folder without a manifest (from elsewhere, or of an older version) is read all the same, to find what cannot be read;
a `note` says that there was nothing to compare its bytes with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import MetadataIndex

from minitron_mcore.checkpoint.folder import find_checkpoint, iteration_folder
from minitron_mcore.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    StoredPiece,
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
    result = Verification()
    manifest = _manifest(place, result)
    try:
        reader = TensorReader(path, iteration)
    except InputError as error:
        result.faults.append(str(error))
        return result
    left = set(manifest.pieces) if manifest else set()
    keys = set()
    stored: dict[MetadataIndex, Any] = reader.metadata.storage_data
    absent = {name for name in {info.relative_path for info in stored.values()} if not (place / name).is_file()}
    if manifest is None:
        result.faults += [f"{place / name} is missing, though .metadata names it" for name in sorted(absent)]
    for index, info in sorted(stored.items(), key=lambda row: (row[1].relative_path, row[1].offset)):
        path = place / info.relative_path
        left.discard(_name(index))
        if info.relative_path in absent:
            continue
        if index.fqn not in reader.tensors:
            _compare_object(path, index.fqn, info, manifest, result)
            continue
        keys.add(index.fqn)
        try:
            tensor = load_piece(place, info)
        except Exception as error:  # torch.load may raise anything on damaged data
            words = " ".join(str(error).split())
            result.faults.append(f"{path} is damaged: {_shown(_name(index))} cannot be read: {words}")
            continue
        result.num_bytes += tensor.nbytes
        _compare(path, _name(index), stored_piece(*_name(index), tensor), manifest, result)
        del tensor  # or it would be in memory beside the next one
    result.faults += _unfound(place, left)
    result.tensors = len(keys)
    return result


def verify_hugging_face(folder: Path) -> Verification:
    """Every tensor of every safetensors file of a Hugging Face folder. One process calls."""
    result = Verification()
    manifest = _manifest(folder, result)
    left = set(manifest.pieces) if manifest else set()
    whole = not result.faults
    for path in sorted(folder.glob("*.safetensors")):
        try:
            file = SafetensorsFile(path)
        except InputError as error:
            whole = False
            result.faults.append(str(error))
            continue
        for name in file.tensors:
            left.discard((name, ()))
            try:
                tensor = file.read(name)
            except InputError as error:
                result.faults.append(str(error))
                continue
            result.tensors += 1
            result.num_bytes += tensor.nbytes
            _compare(path, (name, ()), stored_piece(name, (), tensor), manifest, result)
            del tensor  # or it would be in memory beside the next one
    if whole:  # else the file's own fault says enough
        result.faults += _unfound(folder, left)
    return result


def _manifest(folder: Path, result: Verification) -> Manifest | None:
    """The manifest, with its files compared; if there is none, a note."""
    try:
        manifest = read_manifest(folder)
    except InputError as error:
        result.faults.append(str(error))
        return None
    if manifest is None:
        result.notes.append(
            f"{folder} has no {MANIFEST}: its tensors were read, but there was nothing to compare them with"
        )
        return None
    result.faults += file_faults(folder, manifest)
    return manifest


def _name(index: MetadataIndex) -> Name:
    return index.fqn, tuple(index.offset or ())


def _shown(name: Name) -> str:
    """`decoder.layers.mlp.linear_fc2.weight`, or the same `from (3, 0, 1024) on` for a part of it."""
    key, offsets = name
    return f"{key} from {offsets} on" if any(offsets) else key


def _unfound(folder: Path, names: set[Name]) -> list[str]:
    return [f"{folder} holds no {_shown(name)}, though {MANIFEST} names it" for name in sorted(names)]


def _compare(path: Path, name: Name, found: StoredPiece, manifest: Manifest | None, result: Verification) -> None:
    if manifest is None:
        return
    if (written := manifest.pieces.get(name)) is None:
        result.faults.append(f"{path} holds {_shown(name)}, which {MANIFEST} does not name")
    elif (found.dtype, found.shape) != (written.dtype, written.shape):
        result.faults.append(
            f"{path}: {_shown(name)} is {found.dtype} of shape {found.shape}, where {MANIFEST} says {written.dtype} "
            f"of shape {written.shape}"
        )
    elif found.checksum != written.checksum:
        result.faults.append(f"{path}: {_shown(name)} has changed since it was written: its checksum differs")


def _compare_object(path: Path, key: str, info: Any, manifest: Manifest | None, result: Verification) -> None:
    if manifest is not None and bytes_checksum(path, info.offset, info.length) != manifest.objects.get(key):
        result.faults.append(f"{path}: {key} has changed since it was written: its checksum differs")
