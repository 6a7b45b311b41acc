"""Reads tensors from a torch_dist checkpoint: each rank only its parts, one parameter at a time.

All weights are read through this, whatever layout and names they were saved under, and whoever wrote them.
`dist_checkpointing.load` would unpickle what it finds (see unpickle.py), knows one set of names, and is a collective.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
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

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import iteration_folder, said_by
from minitron_mcore.checkpoint.stored import StoredTensors
from minitron_mcore.errors import InputError
from minitron_mcore.layout import Parameter, local_shape, shard_slices


class TensorReader(StoredTensors):
    """Reads tensors of one finished iteration, whatever layout it was saved at. No collective."""

    def __init__(self, folder: Path, iteration: int, architecture: Architecture | None = None) -> None:
        """Raises InputError if the stored parameters are not those of `architecture`, where it is given."""
        super().__init__(iteration_folder(folder, iteration))
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

    def _load(self, name: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        """One stored piece of the tensor `name`. Raises InputError if it is damaged."""
        try:
            info = self.metadata.storage_data.get(MetadataIndex(name, chunk.offsets))
            if info is None:
                raise ValueError("its .metadata does not say where a part of it lies")
            piece = load_piece(self.folder, info)
            if piece.shape != chunk.sizes:
                raise ValueError(f"a part of it has the shape {tuple(piece.shape)} instead of {tuple(chunk.sizes)}")
        except Exception as error:  # torch.load may raise anything on damaged data
            rule = f"is damaged, {name} cannot be read: {' '.join(str(error).split())}"
            raise InputError("", self.folder, rule) from error
        return piece

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
        name, index, entry = self.find(key, layer)
        stored = tuple(entry.size) if index is None else tuple(entry.size[1:])
        if stored != shape or (index is not None and index >= entry.size[0]):
            wanted = f"{shape}{'' if index is None else ' in each layer'}"
            rule = f"holds {name} of shape {tuple(entry.size)}, but its architecture.yaml means {wanted}"
            raise InputError("", self.folder, rule)
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
            rule = f"is damaged: the stored parts of {name} do not add up to its shape {shape}"
            raise InputError("", self.folder, rule)
        for into, chunk, held in parts:
            into.copy_(self._load(name, chunk)[held])


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
