"""Safetensors written and read piece by piece, so that a file of any size costs the memory of one tensor.

The format: 8 bytes length of the header, little-endian; the header, JSON; then every tensor's bytes, in its order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from minitron_mcore.checkpoint.manifest import tensor_bytes, tensor_checksum
from minitron_mcore.errors import InputError

TYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
DTYPES = {name: dtype for dtype, name in TYPE_NAMES.items()}
_BLOCK = 1 << 20


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
    """Entries by file, in order, at most `max_bytes` each; a larger tensor has a file of its own."""
    files: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not files or entry.num_bytes > room:
            files.append([])
            room = max_bytes
        files[-1].append(entry)
        room -= entry.num_bytes
    return files


def write_safetensors(path: Path, entries: list[Entry], tensors: Iterable[torch.Tensor]) -> list[str]:
    """Write `tensors`, which come in the order of `entries` with their shapes and dtypes; returns their checksums.

    One process calls.
    """
    end = 0
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for entry in entries:
        start, end = end, end + entry.num_bytes
        header[entry.name] = {
            "dtype": TYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    checksums = []
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        coming = iter(tensors)
        for entry in entries:  # not zipped: zip holds a tensor until it has the next one
            tensor = next(coming).contiguous()
            assert tuple(tensor.shape) == entry.shape and tensor.dtype == entry.dtype, entry
            checksums.append(tensor_checksum(tensor))
            write_in_blocks(stream, tensor_bytes(tensor))
            del tensor
        stream.flush()
        os.fsync(stream.fileno())
    return checksums


def write_in_blocks(stream: BinaryIO, content: memoryview) -> int:
    """Write `content`; in blocks that stay in the processor's cache, which is up to twice as fast as in one call."""
    for start in range(0, len(content), _BLOCK):
        stream.write(content[start : start + _BLOCK])
    return len(content)


class SafetensorsFile:
    """Tensors read out of one file by explicit reads: pages mapped from it would count as this process's memory.

    Raises InputError where `path` is no whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt"):  # which checks that the header fits the file
                pass
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path} is no whole safetensors file: {error}") from error
        header.pop("__metadata__", None)
        self.tensors: dict[str, dict[str, Any]] = header
        self._data = 8 + length

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """Raises InputError for a type that no model here is made of."""
        found = self.tensors[name]["dtype"]
        if found not in DTYPES:
            raise InputError(f"{self.path}: {name} is of type {found}, which is not read: {', '.join(DTYPES)} are")
        return DTYPES[found]

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, on the host."""
        target = torch.empty(self.shape(name), dtype=self.dtype(name))
        self.read_into(name, target)
        return target

    def read_into(self, name: str, target: torch.Tensor, axis: int = 0, start: int = 0) -> None:
        """Fill `target`, contiguous and of the stored dtype, with the part of `axis` that begins at `start`.

        The other axes are whole. Only the part's bytes are read. Raises InputError where the file ends before.
        """
        if not target.numel():
            return
        shape = self.shape(name)
        if target.shape == shape:
            axis = 0  # all of it, in one read
        assert target.is_contiguous() and target.dtype == self.dtype(name)
        axis_bytes = prod(shape[axis + 1 :]) * target.dtype.itemsize
        row, part = shape[axis : axis + 1], target.shape[axis : axis + 1]  # both empty for a scalar
        row_bytes, part_bytes = prod(row) * axis_bytes, prod(part) * axis_bytes
        first = self._data + self.tensors[name]["data_offsets"][0] + start * axis_bytes
        buffer = tensor_bytes(target)
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                for number in range(len(buffer) // part_bytes):
                    _fill(descriptor, buffer[number * part_bytes : (number + 1) * part_bytes], first)
                    first += row_bytes
            finally:
                os.close(descriptor)
        except OSError as error:
            raise InputError(f"{self.path}: {name} cannot be read: {error}") from error


def _fill(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Read until `buffer` is full: one call gives at most 2 GiB."""
    while len(buffer):
        count = os.preadv(descriptor, [buffer], offset)
        if not count:
            raise OSError("the file ends inside the tensor")
        buffer, offset = buffer[count:], offset + count
