"""What a run will need of memory, said before anything is loaded; and what helps, where memory runs out after all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError, MemoryExhaustedError
from minitron_mcore.estimate.advice import advice
from minitron_mcore.estimate.forecast import STATIC, Forecast, bytes_text, forecast
from minitron_mcore.estimate.setting import Setting
from minitron_mcore.estimate.states import state_memory
from minitron_mcore.model.recompute import recompute_of
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.training.budget import Timetable, size_keys

# What the allocators say, of the host's memory, the device's and pinned memory, and, on a device that is nearly full,
# cuBLAS and NCCL.
_EXHAUSTED = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cuda failure 2 'out of memory'",
    "Cuda failure 'out of memory'",
)


def check_memory(
    recipe: Recipe,
    runtime: Runtime,
    section: str,
    architecture: Architecture,
    timetable: Timetable,
    teacher: Architecture | None = None,
) -> Forecast:
    """Say what a rank will need by the recipe's `section`, and warn where it is more than is free; every rank calls.

    `teacher`: the one that runs beside the student; None: none does. Raises InputError where what is held throughout
    (weights, gradients, optimizer, teacher) is more than a device has, or offloaded layers more than a node has of host
    memory.
    """
    (free, total), (host_free, host_total) = least_memory(runtime)
    expected = forecast_run(recipe, runtime, section, architecture, timetable, teacher, host_free)
    helpful = advice(expected)
    if expected.static > total:
        held = ", ".join(f"{name} {bytes_text(expected.parts[name])}" for name in STATIC if expected.parts.get(name))
        raise InputError(
            f"{section} needs {bytes_text(expected.static)} on a rank before a token is read ({held}), and a rank has "
            f"{bytes_text(total)}: change parallel.*, teacher.placement or the number of ranks"
            + (f"; {helpful[0]}" if helpful else "")
        )
    copies = f"with a copy on each of {expected.setting.local_ranks} ranks"
    remedy = "set teacher.placement=sharded, or a teacher.parallel of more shards"
    if expected.host > host_total:
        raise InputError(
            f"teacher.placement=offloaded needs {bytes_text(expected.host)} of host memory on a node, {copies}, and a "
            f"node has {bytes_text(host_total)}: {remedy}"
        )
    on_host = f"; host memory of a node: forecast {bytes_text(expected.host)}, free {bytes_text(host_free)}"
    runtime.print(
        f"memory of a rank: forecast {expected}; free {bytes_text(free)} of {bytes_text(total)}"
        + (f"{on_host} of {bytes_text(host_total)}" if expected.host else "")
    )
    if expected.total > free:
        runtime.print(
            f"WARNING: the forecast is {bytes_text(expected.total - free)} more than is free"
            + (f": {'; '.join(helpful)}" if helpful else "")
        )
    if expected.host > host_free:
        runtime.print(
            f"WARNING: teacher.placement=offloaded needs {bytes_text(expected.host - host_free)} more of a node's host "
            f"memory than is free, {copies}, and the system may end the run without a word: {remedy}"
        )
    return expected


def forecast_run(
    recipe: Recipe,
    runtime: Runtime,
    section: str,
    architecture: Architecture,
    timetable: Timetable,
    teacher: Architecture | None,
    host_free: int | None = None,
) -> Forecast:
    """The most that any shape in the timetable needs. `host_free`: bytes of a node's host memory; None: not known."""
    train: Any = getattr(recipe, section)
    shapes = {stretch.first.shape for stretch in timetable.stretches}
    common: dict[str, Any] = {
        "student": architecture,
        "parallel": recipe.parallel,
        "precision": recipe.precision,
        "data_parallel": runtime.world_size // recipe.parallel.replica_ranks,
        "loss_chunk_tokens": train.loss_chunk_tokens,
        "recompute": recompute_of(train),
        "on_cpu": runtime.device.type == "cpu",
        "section": section,
        "local_ranks": runtime.local_size,
        "host_free": host_free,
    }
    if teacher is not None:
        common |= {
            "teacher": teacher,
            "teacher_parallel": recipe.teacher.parallel,
            "teacher_precision": recipe.teacher.precision,
            "teacher_placement": recipe.teacher.placement,
            "teacher_window": train.teacher_window,
            "teacher_trained": train.correct_teacher,
            "teacher_chunk_tokens": recipe.correct.loss_chunk_tokens,
            "teacher_recompute": recompute_of(recipe.correct),
            "states": partial(state_memory, train.hidden_states),
        }
    settings = [
        Setting(
            sequence_length=shape.sequence_length,
            global_batch_size=shape.global_batch_size,
            micro_batch_size=shape.micro_batch_size,
            micro_batch_key=size_keys(train, shape, section)["micro_batch_size"],
            **common,
        )
        for shape in shapes
    ]
    # Of a batch size that ramps up the last is the largest.
    largest: dict[tuple[int, int, str], Setting] = {}
    for setting in sorted(settings, key=lambda setting: setting.global_batch_size):
        largest[setting.sequence_length, setting.micro_batch_size, setting.micro_batch_key] = setting
    found = max(map(forecast, largest.values()), key=lambda found: found.total)
    return replace(found, beside=tuple(setting for setting in largest.values() if setting is not found.setting))


def least_memory(runtime: Runtime) -> tuple[tuple[int, int], tuple[int, int]]:
    """(free, total) bytes of the device of the rank that has least, and of the host of the node; every rank calls."""
    mine = torch.tensor([*device_memory(runtime.local_size), *host_memory()], device=runtime.device)
    torch.distributed.all_reduce(mine, op=torch.distributed.ReduceOp.MIN)
    free, total, host_free, host_total = mine.tolist()
    return (free, total), (host_free, host_total)


def device_memory(local_ranks: int) -> tuple[int, int]:
    """(free, total) bytes of this rank's device; on CPU its share of the host's, or of its container's,
    which the node's `local_ranks` have.

    On CUDA what PyTorch's allocator keeps from earlier work and has given to no tensor is free too.
    """
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated(), total
    free, total = host_memory()
    return free // local_ranks, total // local_ranks


def host_memory() -> tuple[int, int]:
    """(free, total) bytes of this node's host memory, or of its container's, for all of its ranks."""
    rows = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)
    if "MemTotal" not in rows:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    free, total = (1024 * int(rows[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    limit, used = (_read(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    if limit.isdigit() and used.isdigit() and int(limit) < total:
        free, total = min(free, int(limit) - int(used)), int(limit)
    return free, total


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device, or the host, has no memory left."""
    words = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(part in words for part in _EXHAUSTED)
    )


@contextmanager
def explaining_memory(expected: Forecast, when: str) -> Iterator[None]:
    """Within the `with`, memory that runs out is raised as MemoryExhaustedError, with what was needed and what helps.

    when: what was going on, in words.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryExhaustedError) or not is_out_of_memory(error):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise MemoryExhaustedError(explain(expected, when, said)) from error


def explain(expected: Forecast, when: str, said: str) -> str:
    lines = [f"out of memory {when}: {said[:300]}", "the forecast of a rank:", expected.table()]
    if helpful := advice(expected):
        lines += ["what helps most:", *(f"  {line}" for line in helpful)]
    return "\n".join(lines)


def _read(path: str) -> str:
    file = Path(path)
    return file.read_text() if file.is_file() else ""
