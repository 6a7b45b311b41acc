"""Safetensors written and read piece by piece, so that a file of any size costs the memory of a few blocks.

safetensors' `save_file` wants all tensors of a file at once, so writing is done here. The format: 8
bytes with the length of the header, little-endian; the header, JSON; then every tensor's bytes, in its order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from minitron_mcore.checkpoint.blocks import Mover, Rows, copy_quietly, read_at, write_at
from minitron_mcore.checkpoint.manifest import StoredPiece, type_name
from minitron_mcore.errors import InputError

TYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
DTYPES = {name: dtype for dtype, name in TYPE_NAMES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor to come."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def split_files(entries: list[Entry], max_bytes: int) -> list[list[Entry]]:
    """Entries by file, in order, at most `max_bytes` each; a larger tensor has a file of its own.

    Not huggingface_hub's splitter: it puts such a file before the one being filled, out of the stream's order.
    """
    files: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not files or entry.num_bytes > room:
            files.append([])
            room = max_bytes
        files[-1].append(entry)
        room -= entry.num_bytes
    return files


def write_safetensors(
    path: Path, entries: list[Entry], tensors: Sequence[Rows], told: Callable[[int], None] = lambda size: None
) -> list[StoredPiece]:
    """Write `tensors`, which are in the order of `entries` with their shapes and dtypes; returns what was stored.

    told: is called with the bytes of each block that is written. One process calls.
    """
    end, places = 0, []
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for entry in entries:
        start, end = end, end + entry.num_bytes
        places.append(start)
        dtype, shape = TYPE_NAMES[entry.dtype], list(entry.shape)
        header[entry.name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    with path.open("wb", buffering=0) as stream:
        file = stream.fileno()
        write_at(file, memoryview(len(text).to_bytes(8, "little") + text), 0)
        jobs = []
        for entry, rows, place in zip(entries, tensors, places, strict=True):
            assert rows.shape == entry.shape and rows.dtype == entry.dtype, entry
            jobs.append((rows, file, 8 + len(text) + place))
        checksums = Mover(told).all(jobs)
        os.fsync(file)
    return [
        StoredPiece(entry.name, (), entry.shape, type_name(entry.dtype), checksum)
        for entry, checksum in zip(entries, checksums, strict=True)
    ]


class SafetensorsFile:
    """Shapes and types of the tensors in one file, and reads of parts of them.

    safetensors itself checks the header; parts are then read, not mapped: mapped pages count as this process's memory.
    Raises InputError if `path` is not a whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, tuple[tuple[int, ...], str]] = {}  # name -> shape, type
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (no mapping)
                    part = file.get_slice(name)
                    self.tensors[name] = tuple(part.get_shape()), part.get_dtype()
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length))
        except (SafetensorError, OSError) as error:
            raise self._not_whole(error) from error
        self.offsets = {name: 8 + length + header[name]["data_offsets"][0] for name in self.tensors}

    def _not_whole(self, error: Exception) -> InputError:
        return InputError("", self.path, f"is not a whole safetensors file: {error}")

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Raises InputError for a type that is not supported."""
        found = self.tensors[name][1]
        if found not in DTYPES:
            rule = f"holds {name} of type {found}, which is not supported: {', '.join(DTYPES)} are"
            raise InputError("", self.path, rule)
        return DTYPES[found]

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, on the host."""
        target = torch.empty(self.shape(name), dtype=self.dtype(name))
        self.read_into(name, target)
        return target

    def read_into(self, name: str, target: torch.Tensor, axis: int = 0, start: int = 0, row: int = 0) -> None:
        """Fill `target`, of the stored dtype, with the part of `axis` that begins at `start`; the other axes are whole,
        but for the first, whose part begins at `row` where it is not `axis`. Any thread may call.

        Raises InputError if the file has been cut off since.
        """
        assert target.dtype == self.dtype(name)
        if not target.numel():
            return
        first, whole = (start if axis == 0 else row), self.shape(name)
        offset = self.offsets[name] + first * prod(whole[1:]) * target.dtype.itemsize
        try:
            if axis == 0 and target.is_contiguous():
                read_at(self.path, offset, target)
                return
            rows = torch.empty((len(target), *whole[1:]), dtype=target.dtype)
            read_at(self.path, offset, rows)
        except (EOFError, OSError) as error:
            raise self._not_whole(error) from error
        copy_quietly(target, rows if axis == 0 else rows.narrow(axis, start, target.shape[axis]))
