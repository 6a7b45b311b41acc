"""Tensors moved by blocks, on several threads: the bytes, their checksums, what becomes of an error."""

from __future__ import annotations

import io
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from minitron_mcore.checkpoint import blocks
from minitron_mcore.checkpoint.blocks import Mover, Rows, read_at, rearranged, rows_of
from minitron_mcore.checkpoint.manifest import stored_piece
from minitron_mcore.checkpoint.reader import TensorReader, find_elements
from minitron_mcore.checkpoint.stored import FC2
from minitron_mcore.checkpoint.weight_checks import WeightChecks
from minitron_mcore.errors import InputError


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(1, 40),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.randoms(use_true_random=False),
)
def test_rows_in_any_order(lengths, width, block, dtype, random) -> None:  # type: ignore[no-untyped-def]
    """Against torch's own indexing, whatever the blocks' size."""
    tensors = [torch.randn(length, width).to(dtype) for length in lengths]
    order = list(range(sum(lengths)))
    if random.random() < 0.8:
        random.shuffle(order)
    rows = rearranged(lambda parts: torch.cat(parts)[order], [rows_of(tensor) for tensor in tensors])
    expected = torch.cat(tensors)[order]
    assert rows.shape == tuple(expected.shape) and torch.equal(rows.read(), expected)
    for start in range(0, len(order), block):
        part = torch.empty_like(expected[start : start + block])
        rows.fill(part, start)
        assert torch.equal(part, expected[start : start + block])


def test_many_tensors_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one block of each, and more than one thread: every byte is in its place, and was summed in order."""
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    tensors = [torch.randn(rows, width) for rows, width in ((1, 1), (300, 7), (3, 500), (77, 77), (0, 5), (1000, 1))]
    told: list[int] = []
    with (tmp_path / "x").open("wb", buffering=0) as stream:
        ends = torch.tensor([tensor.nbytes for tensor in tensors]).cumsum(0).tolist()
        jobs = [
            (rows_of(tensor), stream.fileno(), end - tensor.nbytes) for tensor, end in zip(tensors, ends, strict=True)
        ]
        checksums = Mover(told.append).all(jobs)
    assert checksums == [stored_piece("", (), tensor).checksum for tensor in tensors]
    assert (tmp_path / "x").read_bytes() == b"".join(tensor.numpy().tobytes() for tensor in tensors)
    assert sum(told) == ends[-1] and len(told) > len(tensors)
    whole = torch.empty(77, 77)
    read_at(tmp_path / "x", ends[3] - whole.nbytes, whole)
    assert torch.equal(whole, tensors[3])
    with pytest.raises(EOFError, match="x ends at byte"):
        read_at(tmp_path / "x", ends[-1] - 8, whole)


def test_an_error_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first job's error is raised as it is, when no thread writes any more."""
    monkeypatch.setattr(blocks, "BLOCK", 8)
    failed, filled = threading.Event(), []

    def fill(target: torch.Tensor, start: int) -> None:
        filled.append(start)
        if start:
            assert failed.wait(60)
        target.zero_()

    def fail(target: torch.Tensor, start: int) -> None:
        failed.set()
        raise ZeroDivisionError("of a thread")

    before = threading.active_count()
    endless, broken = Rows((10**9,), torch.float32, fill), Rows((4,), torch.float32, fail)
    with (tmp_path / "x").open("wb", buffering=0) as stream, pytest.raises(ZeroDivisionError, match="of a thread"):
        Mover().all([(endless, stream.fileno(), 0), (broken, stream.fileno(), 0)])
    assert threading.active_count() == before and 0 < len(filled) < 10**6


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_numbers_are_judged_by_their_bits(data: st.DataObject) -> None:
    """As torch judges their values: any bits, NaN of either sign and subnormal ones too."""
    dtype, size = data.draw(st.sampled_from([(torch.bfloat16, 2), (torch.float16, 2), (torch.float32, 4)]))
    special = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), torch.finfo(dtype).max, torch.finfo(dtype).min]
    values = torch.tensor(data.draw(st.lists(st.sampled_from(special[:2]), max_size=4)), dtype=dtype)
    others = data.draw(st.binary(max_size=6 * size))
    bits = torch.frombuffer(bytearray(others[: len(others) // size * size] + bytes(size)), dtype=dtype)
    some = torch.tensor(data.draw(st.lists(st.sampled_from(special), max_size=2)), dtype=dtype)
    part = torch.cat([values, bits, some])
    checks = WeightChecks()
    checks.look("x", part)
    seen = checks.seen["x"]
    assert (seen.num_elements, seen.finite) == (len(part), bool(part.isfinite().all()))
    assert seen.zero == bool((part == 0).all())


def test_where_elements_lie(tmp_path: Path) -> None:
    """Of what torch.save wrote, behind other bytes: a view of a larger storage too, but nothing that is not in rows."""
    base = torch.arange(60, dtype=torch.float32).view(6, 10)
    for tensor in (base, base[2:5], base.t(), base[:, 3:7]):
        content = io.BytesIO()
        torch.save(tensor, content)
        (tmp_path / "x").write_bytes(bytes(100) + content.getvalue())
        found = find_elements(tmp_path, _StorageInfo("x", 100, len(content.getvalue())))
        assert (found is None) == (not tensor.is_contiguous())
        if found is not None:
            shape, dtype, offset = found
            part = torch.empty(shape, dtype=dtype)
            read_at(tmp_path / "x", offset, part)
            assert torch.equal(part, tensor)


def reader_of(folder: Path, key: str, whole: torch.Tensor, boxes: list[Any], save: Callable[..., None]) -> TensorReader:
    """Of one tensor, stored as the parts `boxes`, (offsets, sizes), in one file."""
    chunks, places = [], {}
    with (folder / "x.distcp").open("wb") as stream:
        for offsets, sizes in boxes:
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            part = whole[tuple(slice(first, first + size) for first, size in zip(offsets, sizes, strict=True))]
            start = stream.tell()
            save(part, stream)
            places[MetadataIndex(key, chunk.offsets)] = _StorageInfo("x.distcp", start, stream.tell() - start)
            chunks.append(chunk)
    entry = TensorStorageMetadata(TensorProperties(dtype=whole.dtype), whole.shape, chunks)
    metadata = Metadata({key: entry}, storage_data=places)
    with (folder / ".metadata").open("wb") as stream:
        pickle.dump(metadata, stream)
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    return TensorReader(folder, 0)


SAVED: dict[str, Callable[..., None]] = {
    "in rows": lambda part, stream: torch.save(part.clone(), stream),
    "within a larger storage": lambda part, stream: torch.save(torch.cat([part, part])[len(part) :], stream),
    "in columns": lambda part, stream: torch.save(part.mT.contiguous().mT, stream),
    "in another type": lambda part, stream: torch.save(part.double(), stream),
}


@pytest.mark.parametrize("way", SAVED)
def test_rows_of_stored_parts(tmp_path: Path, way: str) -> None:
    """Two layers in one part, cut by rows and columns: each block is that of the tensor, however it is stored."""
    place, whole = tmp_path / "iter_0000000", torch.randn(3, 6, 8)
    place.mkdir()
    boxes = [((0, 0, 0), (2, 3, 8)), ((0, 3, 0), (2, 3, 5)), ((0, 3, 5), (2, 3, 3)), ((2, 0, 0), (1, 6, 8))]
    reader = reader_of(place, FC2, whole, boxes, SAVED[way])
    for layer in range(3):
        rows = reader.rows(FC2, layer, (6, 8))
        for start, stop in ((0, 6), (2, 4), (3, 4), (5, 6)):
            block = torch.empty(stop - start, 8)
            rows.fill(block, start)
            assert torch.equal(block, whole[layer, start:stop])
    os.truncate(place / "x.distcp", 100)
    again = reader if way in ("in rows", "within a larger storage") else TensorReader(place, 0)
    with pytest.raises(InputError, match=f"iter_0000000 is damaged, {FC2} cannot be read:"):
        again.rows(FC2, 2, (6, 8)).read()
    with pytest.raises(InputError, match="do not add up to its shape"):
        reader_of(place, FC2, whole, boxes[1:], SAVED[way]).rows(FC2, 1, (6, 8))
