"""What a run will need of memory, said before anything is loaded; and what helps, where memory runs out after all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError, MemoryExhaustedError
from minitron_mcore.memory import STATIC, Forecast, Setting, bytes_text, forecast
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.training.budget import Timetable


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
    (weights, gradients, optimizer, teacher) is more than a device has.
    """
    expected = forecast_run(recipe, runtime, section, architecture, timetable, teacher)
    free, total = least_memory(runtime)
    best = expected.advice(1)
    if expected.static > total:
        held = ", ".join(f"{name} {bytes_text(expected.parts[name])}" for name in STATIC if expected.parts.get(name))
        raise InputError(
            f"{section} needs {bytes_text(expected.static)} on a rank before a token is read ({held}), and a rank has "
            f"{bytes_text(total)}: change parallel.*, teacher.placement or the number of ranks"
            + (f"; {best[0]}" if best else "")
        )
    runtime.print(f"memory of a rank: forecast {expected}; free {bytes_text(free)} of {bytes_text(total)}")
    if expected.total > free:
        runtime.print(
            f"WARNING: the forecast is {bytes_text(expected.total - free)} more than is free"
            + (f": {'; '.join(expected.advice())}" if best else "")
        )
    return expected


def forecast_run(
    recipe: Recipe,
    runtime: Runtime,
    section: str,
    architecture: Architecture,
    timetable: Timetable,
    teacher: Architecture | None,
) -> Forecast:
    """The most that any shape in the timetable needs."""
    train: Any = getattr(recipe, section)
    shapes = {stretch.first.shape for stretch in timetable.stretches}
    common: dict[str, Any] = {
        "student": architecture,
        "parallel": recipe.parallel,
        "precision": recipe.precision,
        "data_parallel": runtime.world_size // recipe.parallel.replica_ranks,
        "loss_chunk_tokens": train.loss_chunk_tokens,
        "recompute_loss": getattr(train, "recompute_loss", False),
        "on_cpu": runtime.device.type == "cpu",
        "section": section,
    }
    if teacher is not None:
        common |= {
            "teacher": teacher,
            "teacher_parallel": recipe.teacher.parallel,
            "teacher_precision": recipe.teacher.precision,
            "teacher_placement": recipe.teacher.placement,
            "teacher_window": train.teacher_window,
            "teacher_trained": train.correct_teacher,
            "hidden_states": train.hidden_states,
        }
    settings = [
        Setting(
            sequence_length=shape.sequence_length,
            global_batch_size=shape.global_batch_size,
            micro_batch_size=shape.micro_batch_size,
            **common,
        )
        for shape in shapes
    ]
    return max(map(forecast, settings), key=lambda found: found.total)


def least_memory(runtime: Runtime) -> tuple[int, int]:
    """(free, total) bytes of the rank that has least; every rank calls."""
    mine = torch.tensor(device_memory(), device=runtime.device)
    torch.distributed.all_reduce(mine, op=torch.distributed.ReduceOp.MIN)
    free, total = mine.tolist()
    return free, total


def device_memory() -> tuple[int, int]:
    """(free, total) bytes of this rank's device; on CPU its share of the host's, or of its container's."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return free, total
    rows = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)
    if "MemTotal" not in rows:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    free, total = (1024 * int(rows[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    limit, used = (_read(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    if limit.isdigit() and used.isdigit() and int(limit) < total:
        free, total = min(free, int(limit) - int(used)), int(limit)
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", "1")))
    return free // sharing, total // sharing


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device, or the host, has no memory left."""
    words = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and any(part in words for part in ("DefaultCPUAllocator: can't allocate memory", "CUDA out of memory"))
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
    if advice := expected.advice():
        lines += ["what helps most:", *(f"  {line}" for line in advice)]
    return "\n".join(lines)


def _read(path: str) -> str:
    file = Path(path)
    return file.read_text() if file.is_file() else ""
