"""Reads tensors from a torch_dist checkpoint: each rank only its parts, one parameter at a time, or rows of it.

All weights are read through this, whatever layout and names they were saved under, and whoever wrote them.
`dist_checkpointing.load` would unpickle what it finds (see unpickle.py), knows one set of names, and is a collective.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StorageReaderTransforms
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.resharding import (
    _check_shard_metadata_pair_overlap,
    _shards_get_overlap_region_wrt_saved_tensor,
)
from torch.distributed.checkpoint.utils import _create_file_view
from torch.serialization import skip_data

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.blocks import THREADS, Rows, copy_quietly, read_at
from minitron_mcore.checkpoint.folder import iteration_folder, said_by
from minitron_mcore.checkpoint.stored import StoredTensors
from minitron_mcore.errors import InputError
from minitron_mcore.layout import Parameter, local_shape, shard_slices


class TensorReader(StoredTensors):
    """Reads tensors of one finished iteration, whatever layout it was saved at. No collective."""

    def __init__(self, folder: Path, iteration: int, architecture: Architecture | None = None) -> None:
        """Raises InputError if the stored parameters are not those of `architecture`, where it is given."""
        super().__init__(iteration_folder(folder, iteration))
        self._places: dict[MetadataIndex, tuple[Path, int] | None] = {}
        self._whole = lru_cache(THREADS)(self.read)  # each thread is at one tensor
        if architecture is not None:
            self.check(architecture, said_by(folder))

    def read(self, key: str, layer: int | None, shape: tuple[int, ...]) -> torch.Tensor:
        """The global tensor `key` (layer `layer` of it, where it has layers), of `shape`, in the stored dtype.

        On the host; beside it only one stored piece is in memory. Raises InputError if the checkpoint does not have the
        tensor, has it in another shape, or is damaged.
        """
        name, index, entry = self.find(key, layer)
        alone = _chunk([0] * len(shape), shape, index)
        if alone in entry.chunks:  # no need to hold a copy as well
            return self._load(name, alone).view(shape)
        whole = torch.empty(shape, dtype=entry.properties.dtype)
        self.fill(whole, key, layer, shape)
        return whole

    def rows(self, key: str, layer: int | None, shape: tuple[int, ...]) -> Rows:
        """`read`, row by row: no more than the rows asked for is in memory, where the writer stored plain elements;
        else the tensors last asked for, whole. Raises InputError as `read`, what is damaged once it is read."""
        name, index, entry = self._entry(key, layer, shape)
        chunks = [chunk for chunk in entry.chunks if index is None or _has_layer(chunk, index)]
        lead = 0 if index is None else 1
        if sum(prod(chunk.sizes[lead:]) for chunk in chunks) != prod(shape):
            raise self._incomplete(name, shape)
        dtype = entry.properties.dtype

        def fill(target: torch.Tensor, start: int) -> None:
            places = [self._place(name, chunk, dtype) for chunk in chunks]
            if None in places:
                target.copy_(self._whole(key, layer, shape)[start : start + len(target)])
                return
            for chunk, place in zip(chunks, places, strict=True):
                assert place is not None
                (first, *columns), (count, *width) = chunk.offsets[lead:], chunk.sizes[lead:]
                begin, end = max(start, first), min(start + len(target), first + count)
                if begin >= end:
                    continue
                path, offset = place
                skipped = (index - chunk.offsets[0]) * count if index is not None else 0
                offset += (skipped + begin - first) * prod(width) * dtype.itemsize
                into = target[begin - start : end - start]
                part = into if tuple(width) == shape[1:] else torch.empty((end - begin, *width), dtype=dtype)
                with self._explaining(name):
                    read_at(path, offset, part)
                if part is into:
                    continue
                for axis, (column, length) in enumerate(zip(columns, width, strict=True), 1):
                    into = into.narrow(axis, column, length)
                copy_quietly(into, part)

        return Rows(shape, dtype, fill)

    def _place(self, name: str, chunk: ChunkStorageMetadata, dtype: torch.dtype) -> tuple[Path, int] | None:
        """The file with one stored piece of the tensor `name`, and where in it the elements begin, row by row; None if
        they do not lie there so. Raises InputError if it is damaged."""
        index = MetadataIndex(name, chunk.offsets)
        if index not in self._places:
            with self._explaining(name):
                info = self._info(name, chunk)
                found = find_elements(self.folder, info)
                shape, stored, offset = found or (chunk.sizes, None, 0)
                _check_shape(shape, chunk)
                self._places[index] = (self.folder / info.relative_path, offset) if stored == dtype else None
        return self._places[index]

    def _load(self, name: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        """One stored piece of the tensor `name`. Raises InputError if it is damaged."""
        with self._explaining(name):
            piece = load_piece(self.folder, self._info(name, chunk))
            _check_shape(piece.shape, chunk)
        return piece

    def _info(self, name: str, chunk: ChunkStorageMetadata) -> Any:
        info = self.metadata.storage_data.get(MetadataIndex(name, chunk.offsets))
        if info is None:
            raise ValueError("its .metadata does not say where a part of it lies")
        return info

    @contextmanager
    def _explaining(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # torch.load may raise anything on damaged data
            rule = f"is damaged, {name} cannot be read: {' '.join(str(error).split())}"
            raise InputError("", self.folder, rule) from error

    def read_part(
        self, parameter: Parameter, architecture: Architecture, layer: int | None, rank: int, size: int
    ) -> torch.Tensor:
        """Tensor-parallel `rank`'s part of a parameter, of `layout.local_shape`, in the stored dtype, on the host."""
        part = torch.empty(local_shape(parameter, architecture, size), dtype=self.dtype(parameter.key, layer))
        self.fill_part(part, parameter, architecture, layer, rank, size)
        return part

    def fill_part(
        self,
        part: torch.Tensor,
        parameter: Parameter,
        architecture: Architecture,
        layer: int | None,
        rank: int,
        size: int,
    ) -> None:
        """`read_part` into a tensor of any dtype and device."""
        slices = shard_slices(parameter, architecture, rank, size)
        self.fill(part, parameter.key, layer, parameter.shape(architecture), parameter.shard_axis, slices)

    def fill(
        self,
        target: torch.Tensor,
        key: str,
        layer: int | None,
        shape: tuple[int, ...],
        axis: int | None = None,
        slices: Sequence[slice] = (),
    ) -> None:
        """Fill `target` with the global tensor of `shape`, or with `slices` of its `axis`, one after the other."""
        name, index, entry = self._entry(key, layer, shape)
        axis, at, parts = axis or 0, 0, []
        for part in slices or [slice(0, shape[axis])]:
            length = part.stop - part.start
            offsets, sizes = [0] * len(shape), list(shape)
            offsets[axis], sizes[axis] = part.start, length
            box = _chunk(offsets, sizes, index)
            into = target.detach().narrow(axis, at, length).view(box.sizes)
            at += length
            for chunk in entry.chunks:
                if _check_shard_metadata_pair_overlap(chunk, box):
                    overlap, here = _shards_get_overlap_region_wrt_saved_tensor(chunk, box), into
                    for dim, _, start, count in overlap:
                        here = here.narrow(dim, start, count)
                    parts.append((here, chunk, tuple(slice(start, start + count) for _, start, _, count in overlap)))
        if sum(into.numel() for into, _, _ in parts) != target.numel():
            raise self._incomplete(name, shape)
        for into, chunk, held in parts:
            into.copy_(self._load(name, chunk)[held])

    def _entry(self, key: str, layer: int | None, shape: tuple[int, ...]) -> tuple[str, int | None, Any]:
        """`find`, and raise InputError if the tensor is not of `shape`."""
        name, index, entry = self.find(key, layer)
        stored = tuple(entry.size) if index is None else tuple(entry.size[1:])
        if stored != shape or (index is not None and index >= entry.size[0]):
            wanted = f"{shape}{'' if index is None else ' in each layer'}"
            rule = f"holds {name} of shape {tuple(entry.size)}, but its architecture.yaml means {wanted}"
            raise InputError("", self.folder, rule)
        return name, index, entry

    def _incomplete(self, name: str, shape: tuple[int, ...]) -> InputError:
        return InputError("", self.folder, f"is damaged: the stored parts of {name} do not add up to its shape {shape}")


def _has_layer(chunk: ChunkStorageMetadata, layer: int) -> bool:
    return chunk.offsets[0] <= layer < chunk.offsets[0] + chunk.sizes[0]


def _check_shape(found: Sequence[int], chunk: ChunkStorageMetadata) -> None:
    if tuple(found) != tuple(chunk.sizes):
        raise ValueError(f"a part of it has the shape {tuple(found)} instead of {tuple(chunk.sizes)}")


def _chunk(offsets: Sequence[int], sizes: Sequence[int], index: int | None) -> ChunkStorageMetadata:
    """A part of a tensor, of which `index` of its leading axis is meant."""
    if index is not None:
        offsets, sizes = (index, *offsets), (1, *sizes)
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def load_piece(place: Path, info: _StorageInfo) -> torch.Tensor:
    """One stored piece of the iteration in the folder `place`; torch.load may raise anything on damaged data."""
    with (place / info.relative_path).open("rb") as stream:
        view: Any = _create_file_view(stream, info.offset, info.length)
        if compression := getattr(info, "transform_descriptors", None):
            plain = _StorageReaderTransforms().transform_load_stream(None, compression, view)  # type: ignore[arg-type]
            view = io.BytesIO(plain.read(-1))
        return torch.load(view, map_location="cpu", weights_only=True)


def find_elements(place: Path, info: _StorageInfo) -> tuple[tuple[int, ...], torch.dtype, int] | None:
    """(shape, dtype, where in its file the elements begin) of one stored piece, which is not read; None if they do not
    lie there plainly: compressed, or not row by row. torch.load may raise anything on damaged data."""
    if getattr(info, "transform_descriptors", None):
        return None
    with (place / info.relative_path).open("rb") as stream:
        view: Any = _create_file_view(stream, info.offset, info.length)
        with skip_data():  # the elements are not read, by older releases of torch either
            piece = torch.load(view, map_location="meta", weights_only=True)
        view.seek(0)
        archive: Any = torch._C.PyTorchFileReader(view)
        plain = archive.has_record("data/0") and not archive.has_record("data/1") and piece.is_contiguous()
        if archive.has_record("byteorder"):
            plain = plain and archive.get_record("byteorder") == sys.byteorder.encode()
        if not plain:
            return None
        first = archive.get_record_offset("data/0") + piece.storage_offset() * piece.dtype.itemsize
    return tuple(piece.shape), piece.dtype, info.offset + first
