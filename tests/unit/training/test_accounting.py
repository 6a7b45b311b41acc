"""What a step costs, from numbers that can be worked out by hand."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from minitron_mcore.architecture import build_architecture
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.distillation.objective import Objective
from minitron_mcore.training.accounting import (
    StepTimers,
    peak_memory,
    split,
    split_line,
    throughput,
)
from minitron_mcore.training.budget import Shape
from minitron_mcore.training.config import LogConfig
from minitron_mcore.training.loop import in_ranges
from minitron_mcore.training.step import not_finite

SHAPE = Shape(phase=0, sequence_length=32, global_batch_size=6, micro_batch_size=1)
TOTAL, STUDENT, TEACHER = (f"{name}throughput per GPU (TFLOP/s/GPU)" for name in ("", "student ", "teacher "))


def job_of(**log: Any) -> Any:
    student = build_architecture(
        {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 16, "num_attention_heads": 2, "vocab_size": 100}
    )
    return SimpleNamespace(
        runtime=SimpleNamespace(world_size=4),
        architecture=student,
        objective=Objective(LossSettings(vocab_size=100)),
        data=SimpleNamespace(sides=1),
        teaching=None,
        log=LogConfig(**log),
        precision="fp32",
    )


def test_throughput_counts_the_teacher() -> None:
    """Three student passes and one of the teacher, over all ranks, by multiplication."""
    job = job_of()
    student, wide = job.architecture, job.architecture.replace(hidden_size=16, num_layers=4)
    tokens = {32: 192.0}
    alone = throughput(job, 0.5, tokens)
    rate = 192 / 0.5
    assert alone["tokens per second"] == rate and alone["elapsed time per iteration (ms)"] == 500
    assert alone["tokens per second per GPU"] == rate / 4
    expected = 3 * student.forward_flops_per_token(32) * rate / 4 / 1e12
    assert alone[TOTAL] == pytest.approx(expected)
    assert TEACHER not in alone and STUDENT not in alone

    job.data.sides = 2  # a pair of answers: each attends to itself alone
    expected_of_pairs = 3 * student.forward_flops_per_token(16) * rate / 4 / 1e12
    assert throughput(job, 0.5, tokens)[TOTAL] == pytest.approx(expected_of_pairs)
    job.data.sides = 1

    job.objective.teacher = SimpleNamespace(architecture=wide)
    both = throughput(job, 0.5, tokens)
    teacher = wide.forward_flops_per_token(32) * rate / 4 / 1e12
    assert both[TEACHER] == pytest.approx(teacher) and both[STUDENT] == pytest.approx(expected)
    assert both[TOTAL] == pytest.approx(expected + teacher)

    # One that is corrected as it teaches goes backward too.
    job.teaching = job.objective.teacher
    corrected = throughput(job, 0.5, tokens)
    assert corrected[TEACHER] == pytest.approx(3 * teacher)
    assert corrected[TOTAL] == pytest.approx(expected + 3 * teacher)


def test_heads_of_the_loss_are_counted() -> None:
    """2 operations x hidden x vocabulary: three of the student's head a token, one of the teacher's."""
    job = job_of()
    wide = job.architecture.replace(hidden_size=16)
    job.objective.teacher = SimpleNamespace(architecture=wide)
    more = job_of()
    more.architecture = job.architecture.replace(vocab_size=164, padded_vocab_size=256)
    more.objective.teacher = SimpleNamespace(architecture=wide.replace(vocab_size=164, padded_vocab_size=256))
    before, after = throughput(job, 1.0, {32: 4.0}), throughput(more, 1.0, {32: 4.0})
    assert (after[STUDENT] - before[STUDENT]) * 1e12 == pytest.approx(3 * 2 * 8 * 64, rel=1e-6)
    assert (after[TEACHER] - before[TEACHER]) * 1e12 == pytest.approx(2 * 16 * 64, rel=1e-6)


def test_steps_of_two_lengths() -> None:
    job = job_of()
    mixed = throughput(job, 1.0, {32: 96.0, 64: 64.0})[TOTAL]
    assert mixed == pytest.approx(sum(throughput(job, 1.0, {n: t})[TOTAL] for n, t in ((32, 96.0), (64, 64.0))))


def test_mfu_needs_a_peak() -> None:
    assert "model FLOPs utilization (%)" not in throughput(job_of(), 1.0, {32: 192.0}), "none is known of a CPU"
    row = throughput(job_of(peak_tflops=1e-5), 1.0, {32: 192.0})
    assert row["model FLOPs utilization (%)"] == pytest.approx(100 * row[TOTAL] / 1e-5)


def test_the_console_shows_means() -> None:
    """Of everything that a step measures; settings are no measurements. What is no number is left out of a mean."""
    interval = StepTimers(0)
    interval.start()
    for loss in (1.0, 2.0, 6.0):
        interval.add({"lm loss": loss, "top-1 agreement": loss / 10, "grad-norm": 1.0, "learning-rate": 1.0}, SHAPE)
    interval.add({"lm loss": float("nan"), "top-1 agreement": float("inf"), "grad-norm": float("nan")}, SHAPE)
    spent = interval.report()
    assert spent.means == pytest.approx({"lm loss": 3.0, "top-1 agreement": 0.3}) and spent.seconds >= 0
    assert spent.tokens == {32: 192.0}
    interval.add({"lm loss": 5.0}, SHAPE)
    assert interval.report().means == {"lm loss": 5.0}


@pytest.mark.parametrize("log_level", [0, 1, 2])
def test_the_parts_add_up(log_level: int) -> None:
    """Timers as they lie inside one another -> parts that do not overlap."""
    seconds = {"batch-generator": 0.5, "objective": 10.0, "teacher-forward": 3.0, "optimizer": 1.0}
    if log_level > 0:
        seconds |= {"forward-backward": 7.0, "all-grads-sync": 0.5, "params-all-gather": 0.25}
    if log_level > 1:
        seconds |= {"forward-compute": 2.5, "logits-loss": 0.5, "backward-compute": 3.0, "forward-recv": 0.25}
    parts = split(seconds, 12.0, log_level)
    inner = [["forward-backward"], ["forward-backward", "communication"]]
    inner += [["forward-compute", "logits-loss", "backward-compute", "communication"]]
    assert list(parts) == ["batch-generator", "teacher-forward", *inner[log_level], "optimizer", "other"]
    assert sum(parts.values()) == pytest.approx(12.0)
    expected = [
        {"forward-backward": 7.0, "optimizer": 1.0, "other": 0.5},
        {"forward-backward": 6.5, "communication": 0.75, "optimizer": 0.75, "other": 0.5},
        {"forward-compute": 2.0, "logits-loss": 0.5, "backward-compute": 3.0, "communication": 1.0, "other": 1.25},
    ][log_level]
    assert {name: parts[name] for name in expected} == pytest.approx(expected)


def test_the_wait_for_data_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)

    def slow() -> Any:
        for number in range(3):
            time.sleep(0.02)
            yield number

    timers = StepTimers(0)
    assert list(timers.batches(slow())) == [0, 1, 2]
    assert 0.06 <= timers.take()["batch-generator"] < 1.0
    assert timers.take()["batch-generator"] == 0.0, "they begin anew"


def test_the_line_of_the_parts() -> None:
    row = {"optimizer-time": 12.345, "optimizer-share": 0.25, "other-time": 1.0, "other-share": 0.75}
    line = split_line(row)
    assert line.endswith("| optimizer: 12.3 (25.0%) | other: 1.0 (75.0%) |")


def test_peak_memory_is_that_of_this_process() -> None:
    """A process that has imported torch: between 50 MiB and 50 GiB."""
    assert 50 * 2**20 < peak_memory() < 50 * 2**30


def test_what_is_no_number() -> None:
    row = {"lm loss": float("nan"), "grad-norm": float("inf"), "learning-rate": 1.0}
    assert not_finite(row) == ["lm loss", "grad-norm"]


def test_ranges_of_samples() -> None:
    assert in_ranges([3, 4, 5, 9, 11, 12]) == "3-5, 9, 11-12"
    assert in_ranges([7]) == "7"
