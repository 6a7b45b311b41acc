"""What a training of the recipe needs of memory, against what its ranks have; before anything is loaded. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError
from minitron_mcore.estimate.advice import advice
from minitron_mcore.estimate.forecast import STATIC, Forecast, bytes_text, forecast
from minitron_mcore.estimate.setting import Setting
from minitron_mcore.model.recompute import recompute_of
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.world import Memory, World
from minitron_mcore.training.budget import Timetable, size_keys


def forecast_run(
    recipe: Recipe,
    section: str,
    architecture: Architecture,
    timetable: Timetable,
    world: World,
    teacher: Architecture | None = None,
) -> Forecast:
    """The most that any shape in the `timetable` of the recipe's `section` needs on a rank.

    teacher: the one that runs beside the student; None: none does. Raises InputError where what is held throughout
    (weights, gradients, optimizer, teacher) exceeds a device's memory, or offloaded layers exceed a node's.
    """
    train: Any = getattr(recipe, section)
    shapes = {start.shape for start in timetable.starts}
    common: dict[str, Any] = {
        "student": architecture,
        "parallel": recipe.parallel,
        "precision": recipe.precision,
        "data_parallel": world.size // recipe.parallel.replica_ranks,
        "loss_chunk_tokens": train.loss_chunk_tokens,
        "recompute": recompute_of(train),
        "on_cpu": world.device == "cpu",
        "section": section,
        "local_ranks": world.local_size,
        "host_free": world.memory.host_free if world.memory else None,
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
            "hidden_states": train.hidden_states,
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
    # Of a batch size that ramps up, the last is the largest.
    largest: dict[tuple[int, int, str], Setting] = {}
    for setting in sorted(settings, key=lambda setting: setting.global_batch_size):
        largest[setting.sequence_length, setting.micro_batch_size, setting.micro_batch_key] = setting
    found = max(map(forecast, largest.values()), key=lambda found: found.total)
    found = replace(found, beside=tuple(setting for setting in largest.values() if setting is not found.setting))
    if world.memory is not None:
        _refuse(found, world.memory)
    return found


def forecast_words(expected: Forecast, memory: Memory | None) -> list[str]:
    """The lines a user sees: the forecast beside what is free, then a warning for each memory that falls short."""
    if memory is None:
        return [f"memory of a rank: forecast {expected}"]
    host = f"; host memory of a node: forecast {bytes_text(expected.host)}, free {bytes_text(memory.host_free)}"
    lines = [
        f"memory of a rank: forecast {expected}; free {bytes_text(memory.free)} of {bytes_text(memory.total)}"
        + (f"{host} of {bytes_text(memory.host_total)}" if expected.host else "")
    ]
    if expected.total > memory.free:
        helpful = "; ".join(advice(expected))
        lines.append(
            f"WARNING: the forecast exceeds the free memory by {bytes_text(expected.total - memory.free)}"
            + (f": {helpful}" if helpful else "")
        )
    if expected.host > memory.host_free:
        lines.append(
            f"WARNING: teacher.placement=offloaded needs {bytes_text(expected.host - memory.host_free)} more of a "
            f"node's host memory than is free, {_copies(expected)}, and the system may kill the run without a message: "
            f"{_HOST_REMEDY}"
        )
    return lines


_HOST_REMEDY = "set teacher.placement=sharded, or a teacher.parallel with more shards"


def _copies(expected: Forecast) -> str:
    return f"with a copy on each of {expected.setting.local_ranks} ranks"


def _refuse(expected: Forecast, memory: Memory) -> None:
    if expected.static > memory.total:
        held = ", ".join(f"{name} {bytes_text(expected.parts[name])}" for name in STATIC if expected.parts.get(name))
        raise InputError(
            expected.setting.section,
            None,
            f"needs {bytes_text(expected.static)} on a rank before a token is read ({held}), and a rank has "
            f"{bytes_text(memory.total)}",
            "; ".join(["change parallel.*, teacher.placement or the number of ranks", *advice(expected)[:1]]),
        )
    if expected.host > memory.host_total:
        raise InputError(
            "teacher.placement",
            "offloaded",
            f"needs {bytes_text(expected.host)} of host memory on a node, {_copies(expected)}, and a node has "
            f"{bytes_text(memory.host_total)}",
            _HOST_REMEDY,
        )
