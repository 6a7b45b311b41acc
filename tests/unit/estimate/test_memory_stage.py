"""The memory forecast as a run makes it: from the recipe, against what a rank and a node have free."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minitron_mcore.architecture import build_architecture
from minitron_mcore.errors import InputError
from minitron_mcore.estimate.forecast import (
    Forecast,
    advice,
    bytes_text,
    forecast,
    forecast_run,
    forecast_words,
)
from minitron_mcore.recipe import Recipe, load_recipe
from minitron_mcore.runtime import start, world
from minitron_mcore.runtime.exhausted import is_out_of_memory
from minitron_mcore.runtime.world import Memory, World
from minitron_mcore.training.budget import plan_timetable

STUDENT = build_architecture(
    {
        "family": "llama",
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 4,
        "num_query_groups": 4,
        "vocab_size": 1024,
    }
)
TEACHER = STUDENT.replace(num_layers=16, hidden_size=256)
GIB = 2**30
BUDGET = ["data.sequence_length=256", "distill.tokens=65536", "distill.global_batch_size=16"]


def world_of(device: str, ranks: int = 1, host_free: int = GIB, host_total: int = 4 * GIB) -> World:
    memory = Memory(64 * GIB, 80 * GIB, host_free, host_total)
    return World(size=ranks, local_size=ranks, device=device, memory=memory)


def forecast_of(recipe: Recipe, world: World) -> Forecast:
    timetable = plan_timetable(recipe.distill, recipe.data.sequence_length, "distill")
    return forecast_run(recipe, "distill", STUDENT, timetable, world, TEACHER)


def test_host_memory_of_an_offloaded_teacher() -> None:
    """8 ranks of a node keep 16 layers each: said, warned of, refused by the key, as there is room for it."""
    recipe = load_recipe(None, [*BUDGET, "precision=bf16", "teacher.placement=offloaded"])
    roomy = world_of("cuda", 8, 2 * GIB)
    found = forecast_of(recipe, roomy)
    needed = found.host
    layer = 2 * (256 * 192 + 64 * 256 + 3 * 256 * 128 + 2 * 256)
    assert needed == 8 * 17 * layer, "a layer is 256 + 64 + 1 KiB: nothing is lost to rounding"
    (line,) = forecast_words(found, roomy.memory)
    assert "; host memory of a node: forecast 42.6 MiB" in line and "free 2.0 GiB of 4.0 GiB" in line
    (line,) = forecast_words(found, None)
    assert line == f"memory of a rank: forecast {found}" and " on a GPU (" in line
    (line,) = forecast_words(forecast_of(recipe, world_of("cpu", 8)), None)
    assert " on the CPU (" in line

    tight = world_of("cuda", 8, needed - 2**20, needed)
    _, warning = forecast_words(forecast_of(recipe, tight), tight.memory)
    assert "WARNING: teacher.placement=offloaded needs 1.0 MiB more of a node's host memory than is free" in warning
    assert "with a copy on each of 8 ranks" in warning and "set teacher.placement=sharded" in warning

    with pytest.raises(InputError, match="of host memory on a node, with a copy on each of 8 ranks") as caught:
        forecast_of(recipe, world_of("cuda", 8, needed - 1, needed - 1))
    assert (caught.value.key, caught.value.value) == ("teacher.placement", "offloaded")
    assert "set teacher.placement=sharded" in caught.value.remedy

    with pytest.raises(InputError, match="of host memory on a node, with a copy on its one rank, and a node has"):
        forecast_of(recipe, world_of("cuda", 1, 0, needed // 8 - 1))

    resident = forecast_of(load_recipe(None, [*BUDGET, "precision=bf16"]), roomy)
    assert resident.host == 0 and "host memory" not in "".join(forecast_words(resident, roomy.memory))


def test_offloading_is_advised_where_the_host_has_room() -> None:
    recipe = load_recipe(None, [*BUDGET, "precision=bf16"])
    for host_free, device, is_said in ((GIB, "cuda", True), (2**20, "cuda", False), (GIB, "cpu", False)):
        lines = advice(forecast_of(recipe, world_of(device, 8, host_free)), 9)
        assert any("teacher.placement=offloaded" in line for line in lines) == is_said, lines


def test_the_key_of_a_phase() -> None:
    """The largest microbatch is a phase's own: that key is named, not the section's, which is 1 already."""
    phases = "distill.phases=[{tokens: 32768}, {tokens: 32768, micro_batch_size: 8}]"
    recipe = load_recipe(None, [*BUDGET, "distill.micro_batch_size=1", phases])
    world = world_of("cuda")
    lines = advice(forecast_of(recipe, world), 9)
    assert any(line.startswith("distill.phases[1].micro_batch_size=1 saves") for line in lines), lines
    assert not any(line.startswith("distill.micro_batch_size") for line in lines)
    # Phases of 4 and 8: one key of two saves what the other phase leaves it.
    both = "distill.phases=[{tokens: 32768, micro_batch_size: 4}, {tokens: 32768, micro_batch_size: 8}]"
    found = forecast_of(load_recipe(None, [*BUDGET, both]), world)
    saving = found.total - forecast(replace(found.setting, micro_batch_size=4)).total
    assert f"distill.phases[1].micro_batch_size=1 saves {bytes_text(saving)}" in advice(found, 9)
    plain = load_recipe(None, [*BUDGET, "distill.micro_batch_size=8"])
    assert any(line.startswith("distill.micro_batch_size=1") for line in advice(forecast_of(plain, world), 9))


def test_the_chunks_of_a_corrected_teacher() -> None:
    """Its own pass runs with correct.loss_chunk_tokens, whatever the student's."""
    common = [*BUDGET, "precision=bf16", "distill.micro_batch_size=8", "distill.loss_chunk_tokens=64"]
    common.append("distill.correct_teacher=true")
    totals = {}
    for chunk in (512, 1024, 2048):
        found = forecast_of(load_recipe(None, [*common, f"correct.loss_chunk_tokens={chunk}"]), world_of("cuda"))
        assert found.setting.teacher_chunk_tokens == chunk and "teacher's training pass" in found.parts
        totals[chunk] = found.total
    assert totals[2048] - totals[512] == 3 * (totals[1024] - totals[512]) > 0


def test_what_the_allocator_keeps_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 80 GiB another process has 5; this one keeps 30, 10 of them in tensors: 20 can be had again."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (45 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 30 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 10 * GIB)
    assert start.device_memory(8) == (65 * GIB, 80 * GIB)


def test_ranks_share_the_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its container's, where that has less; a rank on CPU has its share, a node's offloaded teachers have it all."""
    seen = SimpleNamespace(total=64 * GIB, available=48 * GIB)
    monkeypatch.setattr(world.psutil, "virtual_memory", lambda: seen)
    monkeypatch.setattr(world, "_CGROUP", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert world.host_memory() == (48 * GIB, 64 * GIB) and start.device_memory(4) == (12 * GIB, 16 * GIB)
    (tmp_path / "memory.current").write_text(f"{4 * GIB}\n")
    for limit, expected in (("max", (48 * GIB, 64 * GIB)), (f"{16 * GIB}", (12 * GIB, 16 * GIB))):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert world.host_memory() == expected
    assert start.device_memory(2) == (6 * GIB, 8 * GIB)


def test_a_forecast_of_the_largest_phase() -> None:
    recipe = load_recipe(None, [*BUDGET, "distill.phases=[{tokens: 32768}, {tokens: 32768, sequence_length: 512}]"])
    found = forecast_of(recipe, world_of("cuda"))
    assert found.setting.sequence_length == 512 and found.total == forecast(found.setting).total


@pytest.mark.parametrize(
    ("said", "is_memory"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory: you tried to", True),
        ("rank 1: MemoryError", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("NCCL error: unhandled cuda error. Last error: Cuda failure 2 'out of memory'", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("NCCL error: unhandled system error. Last error: socketStartConnect: Connect failed", False),
    ],
)
def test_who_says_that_memory_ran_out(said: str, is_memory: bool) -> None:
    assert is_out_of_memory(RuntimeError(said)) == is_memory
