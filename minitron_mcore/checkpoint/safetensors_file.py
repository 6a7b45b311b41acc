"""Safetensors written and read piece by piece, so that a file of any size costs the memory of one tensor.

safetensors itself reads; its `save_file` wants all tensors of a file at once, so writing is done here. The format: 8
bytes with the length of the header, little-endian; the header, JSON; then every tensor's bytes, in its order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from minitron_mcore.checkpoint.manifest import StoredPiece, stored_piece, tensor_bytes
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


def write_safetensors(path: Path, entries: list[Entry], tensors: Iterable[torch.Tensor]) -> list[StoredPiece]:
    """Write `tensors`, which come in the order of `entries` with their shapes and dtypes; returns what was stored.

    One process calls.
    """
    end = 0
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for entry in entries:
        start, end = end, end + entry.num_bytes
        dtype, shape = TYPE_NAMES[entry.dtype], list(entry.shape)
        header[entry.name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    stored = []
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        coming = iter(tensors)
        for entry in entries:  # not zipped: zip holds a tensor until it has the next one
            tensor = next(coming).contiguous()
            assert tuple(tensor.shape) == entry.shape and tensor.dtype == entry.dtype, entry
            stored.append(stored_piece(entry.name, (), tensor))
            write_in_blocks(stream, tensor_bytes(tensor))
            del tensor
        stream.flush()
        os.fsync(stream.fileno())
    return stored


def write_in_blocks(stream: BinaryIO, content: memoryview) -> int:
    """Write `content`; in blocks that stay in the processor's cache, which is up to twice as fast as in one call."""
    for start in range(0, len(content), _BLOCK):
        stream.write(content[start : start + _BLOCK])
    return len(content)


class SafetensorsFile:
    """Shapes and types of the tensors in one file, and reads of parts of them.

    The file is open only while a part is read: its mapped pages count as this process's memory. Raises InputError if
    `path` is not a whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, tuple[tuple[int, ...], str]] = {}  # name -> shape, type
        with self._open() as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                part = file.get_slice(name)
                self.tensors[name] = tuple(part.get_shape()), part.get_dtype()

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise InputError("", self.path, f"is not a whole safetensors file: {error}") from error

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

    def read_into(self, name: str, target: torch.Tensor, axis: int = 0, start: int = 0) -> None:
        """Fill `target`, of the stored dtype, with the part of `axis` that begins at `start`; the other axes are whole.

        Raises InputError if the file has been cut off since.
        """
        assert target.dtype == self.dtype(name)
        if not target.numel():
            return
        with self._open() as file:
            if target.shape == self.shape(name):
                target.copy_(file.get_tensor(name))
            else:
                part = slice(start, start + target.shape[axis])
                target.copy_(file.get_slice(name)[(slice(None),) * axis + (part,)])
