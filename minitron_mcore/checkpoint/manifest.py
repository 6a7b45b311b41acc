"""`manifest.json`: checksums of a folder of weights as it was written, to find changed bytes and shortened files.

    {"format": 1, "checksum": "xxh3_128",
     "files":   {NAME: {"size": …, "checksum": …}},      weight files by size alone: their tensors have checksums
     "tensors": {KEY: [{"offsets": …, "shape": …, "dtype": …, "checksum": …}, …]},   one entry for each stored piece
     "objects": {KEY: checksum}}                                                     what is stored beside tensors

Lies beside a checkpoint's weights (in `iter_NNNNNNN/`) and in an exported Hugging Face folder. A tensor's checksum is
that of its elements, row by row, as in memory: it does not depend on the file format. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from minitron_mcore.errors import InputError
from minitron_mcore.files import write_whole

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
FORMAT, ALGORITHM = 1, "xxh3_128"
WEIGHT_FILES = (".distcp", ".safetensors")
_BLOCK = 1 << 24


@dataclass(frozen=True)
class StoredPiece:
    """One stored piece: a whole tensor, or the part of it that begins at `offsets`."""

    key: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    checksum: str


def stored_piece(key: str, offsets: Iterable[int], tensor: torch.Tensor) -> StoredPiece:
    """`tensor`, on any device, as it is about to be stored."""
    # About 10 GB/s from the host's memory.
    checksum = xxhash.xxh3_128_hexdigest(tensor_bytes(tensor))
    return StoredPiece(key, tuple(offsets), tuple(tensor.shape), type_name(tensor.dtype), checksum)


def type_name(dtype: torch.dtype) -> str:
    """`bfloat16`"""
    return str(dtype).removeprefix("torch.")


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements' bytes in row-major order; no copy where the tensor is contiguous and on the host."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def bytes_checksum(path: Path, offset: int = 0, length: int | None = None) -> str:
    """Checksum of a file, or of `length` bytes of it from `offset` on."""
    digest = xxhash.xxh3_128()
    left = path.stat().st_size - offset if length is None else length
    with path.open("rb") as stream:
        stream.seek(offset)
        while left > 0 and (block := stream.read(min(left, _BLOCK))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def write_manifest(folder: Path, pieces: Iterable[StoredPiece], objects: dict[str, str] | None = None) -> None:
    """Write the manifest of everything that is in `folder` now, `pieces` and `objects` in its weight files.

    One process calls, when everything else is written.
    """
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": path.stat().st_size}
        if path.suffix not in WEIGHT_FILES:
            files[name]["checksum"] = bytes_checksum(path)
    tensors: dict[str, list[dict[str, Any]]] = {}
    for piece in sorted(pieces, key=lambda piece: (piece.key, piece.offsets)):
        entry = asdict(piece)
        tensors.setdefault(entry.pop("key"), []).append(entry)
    stored = {"files": files, "tensors": tensors, "objects": dict(sorted((objects or {}).items()))}
    content = {"format": FORMAT, "checksum": ALGORITHM, **stored}
    write_whole(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read: sizes and checksums by file name, pieces by (key, offsets), objects by key."""

    files: dict[str, dict[str, Any]]
    pieces: dict[tuple[str, tuple[int, ...]], StoredPiece]
    objects: dict[str, str]


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in `folder`; None if there is none. Raises InputError if it is damaged or of another format."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (content["format"], content["checksum"]) != (FORMAT, ALGORITHM):
            rule = f"has format {content['format']!r} with checksum {content['checksum']!r}, which is not supported"
            raise InputError("", path, rule, f"only format {FORMAT} with {ALGORITHM} is read")
        pieces = [
            StoredPiece(key, tuple(entry["offsets"]), tuple(entry["shape"]), entry["dtype"], entry["checksum"])
            for key, entries in content["tensors"].items()
            for entry in entries
        ]
        files = {name: {"size": int(entry["size"]), **entry} for name, entry in content["files"].items()}
        return Manifest(files, {(piece.key, piece.offsets): piece for piece in pieces}, dict(content["objects"]))
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError("", path, f"is damaged: it is not a manifest ({type(error).__name__}: {error})") from error


def file_faults(folder: Path, manifest: Manifest) -> list[str]:
    """What is missing, shorter or longer than it was written, or changed; weight files' contents are not read."""
    faults = []
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{path} is missing, though {MANIFEST} names it")
        elif (size := path.stat().st_size) != entry["size"]:
            word = "cut off" if size < entry["size"] else "longer than it was written"
            faults.append(f"{path} is {word}: it has {size:,} bytes where {MANIFEST} says {entry['size']:,}")
        elif "checksum" in entry and bytes_checksum(path) != entry["checksum"]:
            faults.append(f"{path} has changed since it was written: its checksum is not that of {MANIFEST}")
    return faults
