"""Checksums, manifests, slices of safetensors, and what is looked at in weights: in one process, without Megatron.

Checksums against xxhash itself on bytes that numpy lays out; slices against safetensors' own reader.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from minitron_mcore.checkpoint.blocks import rows_of
from minitron_mcore.checkpoint.conversion import Unit, units
from minitron_mcore.checkpoint.manifest import (
    bytes_checksum,
    file_faults,
    read_manifest,
    stored_piece,
    write_manifest,
)
from minitron_mcore.checkpoint.safetensors_file import Entry, SafetensorsFile, write_safetensors
from minitron_mcore.checkpoint.weight_checks import WeightChecks
from minitron_mcore.errors import InputError
from tests.distributed.hf_cases import architecture_of


def tensor_checksum(tensor: torch.Tensor) -> str:
    return stored_piece("any", (), tensor).checksum


def test_checksums() -> None:
    assert tensor_checksum(torch.empty(0)) == "99aa06d3014798d86001c324468d497f"  # xxh3_128 of nothing, as published
    values = numpy.arange(60, dtype=numpy.float32).reshape(3, 4, 5)
    expected = xxhash.xxh3_128_hexdigest(values.tobytes())
    tensor = torch.from_numpy(values.copy())
    assert tensor_checksum(tensor) == expected
    assert tensor_checksum(tensor.permute(2, 1, 0).contiguous().permute(2, 1, 0)) == expected  # the same, laid out else
    assert tensor_checksum(tensor.permute(2, 1, 0)) == xxhash.xxh3_128_hexdigest(values.transpose(2, 1, 0).tobytes())
    assert tensor_checksum(torch.tensor(1.5)) == xxhash.xxh3_128_hexdigest(numpy.float32(1.5).tobytes())
    bf16 = tensor.to(torch.bfloat16)
    assert tensor_checksum(bf16) == xxhash.xxh3_128_hexdigest(bf16.view(torch.int16).numpy().tobytes())
    assert tensor_checksum(torch.nn.Parameter(tensor)) == expected


def write_folder(folder: Path) -> None:
    (folder / "sub").mkdir(parents=True)
    (folder / "a.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "x.txt").write_text("small")
    pieces = [stored_piece("t", (row, 0), torch.full((1, 3), float(row))) for row in (1, 0)]
    write_manifest(folder, pieces, {"rng": "ab"})


def test_a_manifest_and_what_it_finds(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    write_folder(folder)
    manifest = read_manifest(folder)
    assert manifest is not None and file_faults(folder, manifest) == []
    assert manifest.objects == {"rng": "ab"} and set(manifest.pieces) == {("t", (0, 0)), ("t", (1, 0))}
    assert manifest.pieces["t", (1, 0)] == stored_piece("t", (1, 0), torch.ones(1, 3))
    assert set(manifest.files) == {"a.safetensors", "config.json", "sub/x.txt"}
    assert "checksum" not in manifest.files["a.safetensors"], "its tensors have their own"
    assert bytes_checksum(folder / "sub" / "x.txt", 1, 3) == xxhash.xxh3_128_hexdigest(b"mal")

    (folder / "sub" / "x.txt").write_text("sMall")
    os.truncate(folder / "a.safetensors", 3)
    (folder / "config.json").write_text("{} ")
    faults = file_faults(folder, manifest)
    assert [fault.split(": ")[0] for fault in faults] == [
        f"{folder / 'a.safetensors'} is cut off",
        f"{folder / 'config.json'} is longer than it was written",
        f"{folder / 'sub' / 'x.txt'} has changed since it was written",
    ]
    (folder / "config.json").unlink()
    assert f"{folder / 'config.json'} is missing, though manifest.json names it" in file_faults(folder, manifest)


def test_no_manifest_and_none_that_can_be_read(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    write_folder(tmp_path / "x")
    path = tmp_path / "x" / "manifest.json"
    content = json.loads(path.read_text())
    for words, damage in {
        "is damaged": path.read_text()[:-20],
        "it is not a manifest": json.dumps({**content, "tensors": []}),
        "has format 2": json.dumps({**content, "format": 2}),
    }.items():
        path.write_text(damage)
        with pytest.raises(InputError, match=words):
            read_manifest(tmp_path / "x")


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_slices(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Any part of any axis, of what we write and of what safetensors writes."""
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    dtype = data.draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name in ("a", "b")}
    folder = tmp_path_factory.mktemp("slices")
    save_file(tensors, folder / "theirs")
    entries = [Entry(name, tuple(shape), dtype) for name in tensors]
    stored = write_safetensors(folder / "ours", entries, [rows_of(tensor) for tensor in tensors.values()])
    assert stored == [stored_piece(name, (), tensor) for name, tensor in tensors.items()]
    axis = data.draw(st.integers(0, len(shape) - 1))
    start = data.draw(st.integers(0, shape[axis]))
    stop = data.draw(st.integers(start, shape[axis]))
    for path in (folder / "theirs", folder / "ours"):
        file = SafetensorsFile(path)
        with safe_open(path, framework="pt") as reference:
            for name in tensors:
                expected = reference.get_tensor(name).narrow(axis, start, stop - start)
                part = torch.full(expected.shape, 7.0, dtype=dtype)
                file.read_into(name, part, axis, start)
                assert torch.equal(part, expected)
                assert torch.equal(file.read(name), reference.get_tensor(name))


def test_a_file_cut_off_after_it_was_opened(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    os.truncate(tmp_path / "x.safetensors", 200)
    with pytest.raises(InputError, match=r"x\.safetensors is not a whole safetensors file"):
        file.read("a")
    save_file({"a": torch.ones(3, dtype=torch.int8)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="holds a of type I8, which is not supported"):
        SafetensorsFile(tmp_path / "x.safetensors").dtype("a")


def looked_at(unit: Unit, number: int) -> WeightChecks:
    """Every tensor of a model seen once, `unit`'s last tensor seen `number` times, in halves."""
    architecture = architecture_of("nemotron")
    checks = WeightChecks()
    for other in units(architecture):
        for name, shape in zip(other.names, other.shapes(architecture), strict=True):
            for half in torch.ones(shape).chunk(2) * (number if name == unit.names[-1] else 1):
                checks.look(name, half)
    return checks


@pytest.mark.parametrize(("number", "said"), [(1, None), (0, "is all zero"), (2, "parameters were read, but")])
def test_parameters_are_counted(number: int, said: str | None) -> None:
    """Over parts; of the fused qkv only v, unread or read twice."""
    architecture = architecture_of("nemotron")
    wanted = units(architecture)
    unit = next(unit for unit in wanted if len(unit.names) == 3)
    checks = looked_at(unit, number)
    if said is None:
        found = checks.judge(wanted, architecture, Path)
        assert found.num_parameters == architecture.num_parameters and found.num_zero == 0
        assert found.num_tensors == sum(len(unit.names) for unit in wanted)
        return
    with pytest.raises(InputError, match=said):
        checks.judge(wanted, architecture, Path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen(dtype: torch.dtype, value: float) -> None:
    for place in (0, 777, 1023):
        part = torch.zeros(1024, dtype=dtype)
        checks = WeightChecks()
        checks.look("x", part)
        assert checks.seen["x"].finite and checks.seen["x"].zero
        part[place] = value
        checks.look("x", part)
        assert not checks.seen["x"].finite and not checks.seen["x"].zero
