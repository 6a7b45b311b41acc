"""Whole tensors out of a torch_dist checkpoint, one at a time, by one process alone.

`dist_checkpointing.load` is a collective; what only one rank does (export) reads through this instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from minitron_mcore.checkpoint.folder import iteration_folder
from minitron_mcore.errors import InputError


class TensorReader:
    """Reads global tensors of one finished iteration, whatever layout it was saved at. No collective."""

    def __init__(self, folder: Path, iteration: int) -> None:
        self.folder = iteration_folder(folder, iteration)
        self.storage = FileSystemReader(self.folder)
        try:
            metadata: Metadata = self.storage.read_metadata()
        except Exception as error:  # unpickling raises whatever the damage led to
            raise InputError(f"{self.folder} has no readable .metadata: {error}") from error
        self.storage.set_up_storage_reader(metadata, is_coordinator=True)
        self.tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def _entry(self, key: str) -> TensorStorageMetadata:
        if key not in self.tensors:
            raise InputError(f"{self.folder} holds no tensor {key}: it does not fit its architecture.yaml")
        return self.tensors[key]

    def dtype(self, key: str) -> torch.dtype:
        return self._entry(key).properties.dtype

    def read(self, key: str, layer: int | None, shape: tuple[int, ...]) -> torch.Tensor:
        """The global tensor `key` (layer `layer` of it, where it has layers), of `shape`, in the stored dtype.

        On the host; beside it only one stored piece is in memory. Raises InputError where the checkpoint holds no such
        tensor, holds another shape, or is damaged.
        """
        entry = self._entry(key)
        stored = tuple(entry.size) if layer is None else tuple(entry.size[1:])
        if stored != shape or (layer is not None and layer >= entry.size[0]):
            raise InputError(
                f"{self.folder}: {key} is of shape {tuple(entry.size)}, which does not fit its architecture.yaml "
                f"({shape}{'' if layer is None else ' in each layer'})"
            )
        whole = torch.empty(shape, dtype=entry.properties.dtype)
        target = whole if layer is None else whole[None]
        pieces = [
            (chunk.offsets, chunk.sizes)
            for chunk in entry.chunks
            if layer is None or chunk.offsets[0] <= layer < chunk.offsets[0] + chunk.sizes[0]
        ]
        assert sum(size.numel() // (1 if layer is None else size[0]) for _, size in pieces) == whole.numel(), key
        items = [_read_item(key, offsets, sizes, layer) for offsets, sizes in pieces]
        try:
            self.storage.read_data(LoadPlan(items), _Into(target)).wait()  # type: ignore[arg-type]
        except Exception as error:  # torch.load raises whatever the damage led to
            raise InputError(f"{self.folder} is damaged, {key} cannot be read: {error}") from error
        return whole


def _read_item(key: str, offsets: torch.Size, sizes: torch.Size, layer: int | None) -> ReadItem:
    """One stored piece, cut to the layer."""
    storage, target, lengths = [0] * len(sizes), list(offsets), list(sizes)
    if layer is not None:
        storage[0], target[0], lengths[0] = layer - offsets[0], 0, 1
    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=MetadataIndex(key),
        dest_offsets=torch.Size(target),
        storage_index=MetadataIndex(key, offsets),
        storage_offsets=torch.Size(storage),
        lengths=torch.Size(lengths),
    )


class _Into:
    """As much of torch's LoadPlanner as reading takes: where in the target each piece goes."""

    def __init__(self, target: torch.Tensor) -> None:
        self.target = target

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        part = self.target
        for axis, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            part = part.narrow(axis, start, length)
        return part

    def commit_tensor(self, item: ReadItem, tensor: Any) -> None:
        """The piece already lies in place."""
