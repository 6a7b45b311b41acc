"""The cost of a whole training, from the times of its steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest

from minitron_mcore.architecture import build_architecture
from minitron_mcore.estimate import step_time as times
from minitron_mcore.estimate.cost import cost_of
from minitron_mcore.estimate.model import Setting
from minitron_mcore.estimate.step_time import step_time
from minitron_mcore.estimate.words import total_line
from minitron_mcore.runtime.config import ClusterConfig, ParallelConfig
from minitron_mcore.runtime.devices import machine_of
from minitron_mcore.training.budget import plan_timetable
from minitron_mcore.training.config import PhaseConfig, TrainConfig

MODEL = build_architecture(
    {"num_layers": 8, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 16, "vocab_size": 32000}
)
TEACHER = MODEL.replace(num_layers=16)
MACHINE = machine_of(ClusterConfig(device="H100", price=2.0, power=1000.0))


def setting(batch: int, length: int = 1024, **changes: Any) -> Setting:
    fields: dict[str, Any] = {"parallel": ParallelConfig(), "precision": "bf16", "data_parallel": 4, **changes}
    return Setting(
        student=MODEL,
        sequence_length=length,
        global_batch_size=batch,
        micro_batch_size=1,
        loss_chunk_tokens=None,
        **fields,
    )


def test_every_stretch_counts_at_its_own_pace() -> None:
    """A ramp from 8 by 8 to 16 over 32 samples, then a phase of twice the length: by hand from the times of a step."""
    train = TrainConfig(
        global_batch_size=16,
        micro_batch_size=1,
        rampup_batch_size=[8, 8, 32],
        phases=[PhaseConfig(tokens=100 * 1024), PhaseConfig(tokens=64 * 1024, sequence_length=2048)],
        tokens=164 * 1024,
    )
    timetable = plan_timetable(train, 1024, "train")
    settings = [setting(8), setting(16), setting(16, 2048)]
    small, middle, long = (step_time(each, MACHINE) for each in settings)
    found = cost_of(timetable, settings, MACHINE)
    counts = [
        then.iteration - first.iteration
        for first, then in zip(timetable.starts, [*timetable.starts[1:], timetable.end], strict=True)
    ]
    assert len(counts) == 3
    seconds = counts[0] * small.total + counts[1] * middle.total + counts[2] * long.total
    assert found.seconds == pytest.approx(seconds) and found.iterations == sum(counts)
    assert found.tokens == timetable.tokens and found.last == long and found.gpus == 4
    assert found.gpu_hours == pytest.approx(4 * seconds / 3600) and found.days == pytest.approx(seconds / 86400)
    assert found.cost == pytest.approx(2 * found.gpu_hours)
    assert found.energy == pytest.approx(found.gpu_hours), "a kilowatt for each GPU"
    assert found.tokens_per_second == pytest.approx(timetable.tokens / seconds)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"teacher": TEACHER, "teacher_window": 8, "parallel": ParallelConfig(pipeline=2)},
        {"teacher": TEACHER, "teacher_trained": True},
        {"teacher": TEACHER, "teacher_parallel": ParallelConfig(tensor=2), "teacher_placement": "sharded"},
    ],
    ids=["alone", "ahead", "corrected", "apart"],
)
def test_a_ramp_up_is_worked_out_once(changes: dict[str, Any]) -> None:
    """Each of 96 sizes takes just what it takes alone; the work of a microbatch, which they share, is done once, where
    96 times took most of an estimate's 13 seconds."""
    train = TrainConfig(global_batch_size=384, micro_batch_size=1, rampup_batch_size=[4, 4, 96000], tokens=10**9)
    timetable = plan_timetable(train, 1024, "distill")
    settings = [setting(start.shape.global_batch_size, **changes) for start in timetable.starts]
    assert len(settings) == 96
    alone = [step_time(each, MACHINE) for each in settings]
    with patch.object(times, "_student_stages", wraps=times._student_stages) as passes:
        assert times.step_times(settings, MACHINE) == alone
    assert passes.call_count == (2 if changes.get("teacher_trained") else 1)
    pairs = zip(timetable.starts, [*timetable.starts[1:], timetable.end], strict=True)
    counts = [then.iteration - first.iteration for first, then in pairs]
    seconds = sum(count * each.total for count, each in zip(counts, alone, strict=True))
    assert cost_of(timetable, settings, MACHINE).seconds == pytest.approx(seconds)


def test_one_hour_is_no_hours() -> None:
    timetable = plan_timetable(TrainConfig(global_batch_size=16, micro_batch_size=1, tokens=16384), 1024, "train")
    hour = replace(cost_of(timetable, [setting(16)], replace(MACHINE, price=None, power=None)), gpus=1, seconds=3600.0)
    assert total_line([hour]) == "all trainings: 60.0 minutes, 1 GPU-hour"


def test_what_nobody_said_is_not_known() -> None:
    timetable = plan_timetable(TrainConfig(global_batch_size=16, micro_batch_size=1, tokens=16384), 1024, "train")
    found = cost_of(timetable, [setting(16)], replace(MACHINE, price=None, power=None))
    assert found.cost is None and found.energy is None
    assert cost_of(timetable, [setting(16)], replace(MACHINE, price=0.0)).cost == 0


def test_twice_the_gpus() -> None:
    """Sooner, and at no fewer GPU-hours."""
    timetable = plan_timetable(TrainConfig(global_batch_size=16, micro_batch_size=1, tokens=163840), 1024, "train")
    own = setting(16)
    more = replace(own, data_parallel=2 * own.data_parallel)
    one, two = cost_of(timetable, [own], MACHINE), cost_of(timetable, [more], MACHINE)
    assert two.gpus == 2 * one.gpus and two.hours < one.hours and two.gpu_hours > one.gpu_hours
    beside = cost_of(timetable, [own], MACHINE, side_by_side=2)
    assert (beside.hours, beside.gpu_hours) == (one.hours, 2 * one.gpu_hours), "two trainings, each on its own GPUs"
