"""Checkpoints written as a stream: a few blocks, or one parameter, are in memory, whatever the size of the shard.

The result is the torch_dist checkpoint that `dist_checkpointing.save` would write, with a manifest of its checksums:

    iter_NNNNNNN/__R_0.distcp     what rank R wrote, one torch.save after the other
    iter_NNNNNNN/.metadata        which piece of which tensor lies where
    iter_NNNNNNN/common.pt, metadata.json, manifest.json
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import skip_data
from torch.utils.serialization import config

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.blocks import Mover, Rows, rows_of
from minitron_mcore.checkpoint.iteration import write_iteration
from minitron_mcore.checkpoint.manifest import StoredPiece, type_name
from minitron_mcore.checkpoint.way_back import extra_states
from minitron_mcore.layout import Parameter, shard_slices
from minitron_mcore.runtime.progress import Bar
from minitron_mcore.runtime.start import Runtime


@dataclass(frozen=True)
class Piece:
    """A part of a global tensor that one rank stores: where it begins (`offsets`) and its `shape`, both as long as
    `global_shape`. A layer's parameter has the layer as its leading axis, of length 1 here."""

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Source:
    """A piece, and its tensor, of as many elements: rows that any thread may ask for, or `read`, which gives it whole
    when it is its turn to be written. That may run collectives if all ranks concerned order their sources alike."""

    piece: Piece
    read: Rows | Callable[[], torch.Tensor]


def shard_pieces(
    parameter: Parameter, architecture: Architecture, dtype: torch.dtype, layer: int | None, rank: int, size: int
) -> tuple[Piece, ...]:
    """What tensor-parallel `rank` of `size` stores of one parameter (of one global layer), without building a model.

    One piece; two of a gated fc1, [gate_r ; up_r]; none of a replicated parameter, which the first rank stores. They
    are those of `GPTModel.sharded_state_dict` (a test checks that).
    """
    shape, axis = parameter.shape(architecture), parameter.shard_axis or 0
    spans = shard_slices(parameter, architecture, rank, size)
    if parameter.shard_axis is None and rank == 0:
        spans = [slice(0, shape[0])]
    stacked, place, one = ((), (), ()) if layer is None else ((architecture.num_layers,), (layer,), (1,))
    return tuple(
        Piece(
            parameter.key,
            (*stacked, *shape),
            (*place, *(span.start if each == axis else 0 for each in range(len(shape)))),
            (*one, *shape[:axis], span.stop - span.start, *shape[axis + 1 :]),
            dtype,
        )
        for span in spans
    )


def pieces_of(parts: Iterable[ShardedTensor]) -> tuple[Piece, ...]:
    """The pieces that this rank stores of Megatron's sharded tensors."""
    return tuple(
        Piece(
            part.key,
            tuple(part.global_shape),
            tuple(part.global_offset),
            (*(1,) * part.prepend_axis_num, *part.local_shape),
            part.dtype,
        )
        for part in parts
        if is_main_replica(part.replica_id)
    )


def save_stream(
    folder: Path,
    iteration: int,
    sources: Iterable[Source],
    runtime: Runtime,
    judge: Callable[[], Any] = lambda: None,
    *,
    architecture: Architecture | None = None,
    called: str | None = None,
    title: str = "writing",
) -> Any:
    """Write each rank's `sources` as a whole iteration of `folder`; all ranks call, each with its own, possibly none.
    title: of the bar.

    With an `architecture`, what other projects on megatron-core need to load it is written too (way_back.py).

    Of sources that are read one tensor is in memory at a time, of rows a few blocks. `judge` is called on every rank
    when all is written, and may refuse it; what it gives is returned. Every error is raised on every rank, and nothing
    of the iteration is left behind. An InputError of `read` passes unchanged; a full or forbidden disk becomes one,
    which calls the folder `called`.
    """
    chosen = list(sources)
    objects = extra_states(architecture) if architecture is not None and runtime.is_main else []

    judged: list[Any] = []

    def write(temporary: Path) -> list[StoredPiece]:
        size = sum(source.piece.num_bytes for source in chosen)
        # A stored tensor's own checksum is in the manifest; torch.load never reads the CRC-32, which takes longer.
        without_crc32 = config.patch("save.compute_crc32", False)  # type: ignore[attr-defined]  # given at import
        with runtime.progress(size, "B", title) as bar, without_crc32:
            writer = _StreamWriter(temporary, chosen, objects, bar)
            dcp.save({}, storage_writer=writer, planner=_StreamPlanner(chosen, objects))
        judged.append(judge())
        return writer.stored

    write_iteration(folder, iteration, runtime, write, {}, architecture, called)
    return judged[0]


class _StreamPlanner(dcp.DefaultSavePlanner):
    """Plans from shapes only; the tensors come later."""

    def __init__(self, sources: list[Source], objects: list[ShardedObject]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.sources, self.objects = sources, objects

    def create_local_plan(self) -> dcp.SavePlan:
        pieces = [_write_item(source.piece) for source in self.sources]
        objects = [dcp.WriteItem(MetadataIndex(value.unique_key), WriteItemType.BYTE_IO) for value in self.objects]
        self.plan = dcp.SavePlan(pieces + objects)
        return self.plan


def _write_item(piece: Piece) -> dcp.WriteItem:
    offsets = torch.Size(piece.offsets)
    return dcp.WriteItem(
        index=MetadataIndex(piece.key, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(piece.shape)),
            properties=TensorProperties(dtype=piece.dtype),
            size=torch.Size(piece.global_shape),
        ),
    )


class _StreamWriter(dcp.FileSystemWriter):
    """Writes the rank's data when torch asks for it: what torch.save puts around tensors, with holes for their
    elements, and `objects`; then the elements of the sources, which fill the holes."""

    def __init__(self, path: Path, sources: list[Source], objects: list[ShardedObject], bar: Bar) -> None:
        super().__init__(path, thread_count=1)
        self.sources, self.objects, self.bar = sources, objects, bar
        self.stored: list[StoredPiece] = []

    @property
    def checkpoint_id(self) -> str:
        """A string: a pickled Path has another name in Python 3.13."""
        return str(self.path)

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._written(plan) if plan.items else [])
        return done

    def _written(self, plan: dcp.SavePlan) -> list[WriteResult]:
        name, items = f"{plan.storage_data.prefix}0.distcp", iter(plan.items)
        results: list[WriteResult] = []
        with (Path(self.path) / name).open("wb") as stream:

            def put(index: MetadataIndex, content: Any) -> int:
                """Where the elements belong, which are left out."""
                assert next(items).index == index, index
                start = stream.tell()
                hole = _save(content, stream)
                length = stream.tell() - start
                results.append(WriteResult(index, length, _StorageInfo(name, start, length)))
                return hole

            places = []
            for piece in (source.piece for source in self.sources):
                with skip_data():  # memory that is not written to costs nothing
                    untouched = torch.empty(piece.shape, dtype=piece.dtype)
                    places.append(put(MetadataIndex(piece.key, torch.Size(piece.offsets)), untouched))
                    del untouched
            for value in self.objects:  # as megatron-core stores them: the list of their parts
                put(MetadataIndex(value.unique_key), [value.data])
            stream.flush()
            self._fill(stream.fileno(), places)
            os.fsync(stream.fileno())
        return results

    def _fill(self, descriptor: int, places: list[int]) -> None:
        """Write every source's elements at its place."""
        mover = Mover(self.bar.advance)
        checksums: dict[int, str] = {}
        for number, (source, place) in enumerate(zip(self.sources, places, strict=True)):
            if not isinstance(source.read, Rows):  # in order: the ranks may read together
                tensor = source.read()
                assert (tensor.nbytes, tensor.dtype) == (source.piece.num_bytes, source.piece.dtype), source.piece
                flat = tensor.detach().cpu().reshape(-1)
                checksums[number] = mover.move(rows_of(flat), descriptor, place)
                del tensor, flat  # or they would be in memory beside the next ones
        jobs = {number: source.read for number, source in enumerate(self.sources) if isinstance(source.read, Rows)}
        for number, rows in jobs.items():
            piece = self.sources[number].piece
            assert (prod(rows.shape), rows.dtype) == (prod(piece.shape), piece.dtype), piece
        found = mover.all([(rows, descriptor, places[number]) for number, rows in jobs.items()])
        checksums.update(zip(jobs, found, strict=True))
        for number, source in enumerate(self.sources):
            piece = source.piece
            stored = StoredPiece(piece.key, piece.offsets, piece.shape, type_name(piece.dtype), checksums[number])
            self.stored.append(stored)


def _save(content: Any, stream: BinaryIO) -> int:
    """Where a hole was left for a tensor's elements, if there was."""
    parts = _Parts(stream)
    try:
        torch.save(content, parts)  # type: ignore[arg-type]
    except RuntimeError as error:
        # On a full disk torch, closing its archive, reports only that the archive is broken.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise cause from None
    return parts.hole


class _Parts:
    """The part of a file's interface that torch.save needs."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.hole = stream, stream.tell()

    def write(self, content: bytes | memoryview) -> int:
        return self.stream.write(content)

    def seek(self, offset: int, whence: int) -> int:
        """Over elements that are left out."""
        self.hole = self.stream.tell()
        return self.stream.seek(offset, whence)

    def flush(self) -> None:
        self.stream.flush()
