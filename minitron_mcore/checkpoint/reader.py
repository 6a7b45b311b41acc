"""Reads tensors from a torch_dist checkpoint: each rank only its parts, one parameter at a time.

All weights are read through this, whatever layout and names they were saved under, and whoever wrote them.
`dist_checkpointing.load` would unpickle what it finds (see unpickle.py), knows one set of names, and is a collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.utils import _create_file_view

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import iteration_folder
from minitron_mcore.checkpoint.stored import StoredTensors
from minitron_mcore.checkpoint.stored_names import Place
from minitron_mcore.errors import InputError
from minitron_mcore.layout import Parameter, local_shape, shard_slices


class TensorReader(StoredTensors):
    """Reads tensors of one finished iteration, whatever layout it was saved at. No collective."""

    def __init__(self, folder: Path, iteration: int) -> None:
        super().__init__(iteration_folder(folder, iteration))
        self.storage = FileSystemReader(self.folder)
        self.storage.set_up_storage_reader(self.metadata, is_coordinator=True)

    def read(self, key: str, layer: int | None, shape: tuple[int, ...]) -> torch.Tensor:
        """The global tensor `key` (layer `layer` of it, where it has layers), of `shape`, in the stored dtype.

        On the host; beside it only one stored piece is in memory. Raises InputError if the checkpoint does not have the
        tensor, has it in another shape, or is damaged.
        """
        if (alone := self._only_piece(key, layer, shape)) is not None:
            return alone.view(shape)
        whole = torch.empty(shape, dtype=self.dtype(key, layer))
        self.fill(whole, key, layer, shape)
        return whole

    def _only_piece(self, key: str, layer: int | None, shape: tuple[int, ...]) -> torch.Tensor | None:
        """The stored piece that is exactly the whole tensor (the layer), as loaded; None if there is none."""
        place, entry = self.find(key, layer)
        sizes = torch.Size(shape if place.layer is None else (1, *shape))
        offsets = torch.Size([place.layer or 0] + [0] * (len(sizes) - 1))
        if len(entry.size) != len(sizes) or ChunkStorageMetadata(offsets, sizes) not in entry.chunks:
            return None
        try:
            info = self.storage.storage_data[MetadataIndex(place.name, offsets)]
            if getattr(info, "transform_descriptors", None):  # compressed: left to torch's own reader
                return None
            loaded = load_piece(self.folder, info)
        except Exception as error:  # torch.load may raise anything on damaged data
            raise self._damaged(place, error) from error
        return loaded if loaded.shape == sizes else None

    def _damaged(self, place: Place, error: Exception) -> InputError:
        missing = isinstance(error, KeyError) and isinstance(error.args[0], MetadataIndex)
        words = "its .metadata does not say where a part of it lies" if missing else " ".join(str(error).split())
        return InputError("", self.folder, f"is damaged, {place.name} cannot be read: {words}")

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
        place, entry = self.find(key, layer)
        stored = tuple(entry.size) if place.layer is None else tuple(entry.size[1:])
        if stored != shape or (place.layer is not None and place.layer >= entry.size[0]):
            wanted = f"{shape}{'' if place.layer is None else ' in each layer'}"
            rule = f"holds {place.name} of shape {tuple(entry.size)}, but its architecture.yaml means {wanted}"
            raise InputError("", self.folder, rule)
        target = target.detach() if place.layer is None else target.detach()[None]
        shift = 0 if place.layer is None else 1
        items, at = [], 0
        for part in slices or [slice(0, shape[axis or 0])]:
            box = [(0, length) for length in stored]
            box[axis or 0] = (part.start, part.stop)
            box = box if place.layer is None else [(place.layer, place.layer + 1), *box]
            # Where the box's first element goes in the target.
            origin = [0] * len(box)
            origin[(axis or 0) + shift] = at
            items += [item for chunk in entry.chunks if (item := _read_item(place.name, chunk, box, origin))]
            at += part.stop - part.start
        if sum(prod(item.lengths) for item in items) != target.numel():
            rule = f"is damaged: the stored parts of {place.name} do not add up to its shape {shape}"
            raise InputError("", self.folder, rule)
        try:
            self.storage.read_data(LoadPlan(items), _Into(target)).wait()  # type: ignore[arg-type]
        except Exception as error:  # torch.load may raise anything on damaged data
            raise self._damaged(place, error) from error


def load_piece(place: Path, info: _StorageInfo) -> torch.Tensor:
    """One stored piece of the iteration in the folder `place`; torch.load may raise anything on damaged data."""
    with (place / info.relative_path).open("rb") as stream:
        view: Any = _create_file_view(stream, info.offset, info.length)
        return torch.load(view, map_location="cpu", weights_only=True)


def _read_item(
    name: str, chunk: ChunkStorageMetadata, box: list[tuple[int, int]], origin: list[int]
) -> ReadItem | None:
    """The part of `box` (start, stop on every axis) that lies in one stored piece; None if there is none."""
    starts = [max(low, offset) for (low, _), offset in zip(box, chunk.offsets, strict=True)]
    stops = [min(high, offset + size) for (_, high), offset, size in zip(box, chunk.offsets, chunk.sizes, strict=True)]
    if any(stop <= start for start, stop in zip(starts, stops, strict=True)):
        return None
    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=MetadataIndex(name),
        dest_offsets=torch.Size(
            place + start - low for place, start, (low, _) in zip(origin, starts, box, strict=True)
        ),
        storage_index=MetadataIndex(name, chunk.offsets),
        storage_offsets=torch.Size(start - offset for start, offset in zip(starts, chunk.offsets, strict=True)),
        lengths=torch.Size(stop - start for start, stop in zip(starts, stops, strict=True)),
    )


class _Into:
    """The part of torch's LoadPlanner that reading needs: where in the target each piece goes."""

    def __init__(self, target: torch.Tensor) -> None:
        self.target = target

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        part = self.target
        for axis, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            part = part.narrow(axis, start, length)
        return part

    def commit_tensor(self, item: ReadItem, tensor: Any) -> None:
        """The piece already lies in place."""
