"""Safetensors written piece by piece, so that a file of any size costs the memory of one tensor.

The format: 8 bytes length of the header, little-endian; the header, JSON; then every tensor's bytes, in its order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

TYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


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


def write_safetensors(path: Path, entries: list[Entry], tensors: Iterable[torch.Tensor]) -> None:
    """Write `tensors`, which come in the order of `entries` with their shapes and dtypes. One process calls."""
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
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for entry, tensor in zip(entries, tensors, strict=True):
            assert tuple(tensor.shape) == entry.shape and tensor.dtype == entry.dtype, entry
            stream.write(tensor.contiguous().view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())
