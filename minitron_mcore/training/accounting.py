"""What a step costs: its time, and the rates that follow from it."""

from __future__ import annotations

import time

from minitron_mcore.training.job import Job


class Interval:
    """Time (reading the data included; validation and saving not) and mean losses since the last line."""

    def __init__(self) -> None:
        self.seconds, self.steps = 0.0, 0
        self.losses: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        self._started = time.perf_counter()

    def add(self, row: dict[str, float]) -> None:
        """End a step that began at `start`; the next one begins."""
        self.seconds += time.perf_counter() - self._started
        self.steps += 1
        for name, value in row.items():
            if name.endswith("loss"):
                self.losses[name] = self.losses.get(name, 0.0) + value
        self.start()

    def report(self) -> tuple[float, dict[str, float]]:
        """(seconds a step, mean losses), and begin anew."""
        seconds, losses = self.seconds / self.steps, {name: value / self.steps for name, value in self.losses.items()}
        self.seconds, self.steps, self.losses = 0.0, 0, {}
        return seconds, losses


def throughput(job: Job, step_seconds: float) -> dict[str, float]:
    """Tokens and floating-point operations a second; the teacher's operations count, and are shown apart."""
    tokens_per_second = job.train.global_batch_size * job.sequence_length / step_seconds
    scale = tokens_per_second / job.runtime.world_size / 1e12
    student = job.architecture.training_flops_per_token(job.sequence_length) * scale
    row = {
        "elapsed time per iteration (ms)": 1000 * step_seconds,
        "throughput per GPU (TFLOP/s/GPU)": student,
        "tokens per second": tokens_per_second,
    }
    if job.objective.teacher is not None:
        teacher = job.objective.teacher.architecture.forward_flops_per_token(job.sequence_length) * scale
        row["throughput per GPU (TFLOP/s/GPU)"] += teacher
        row["teacher throughput per GPU (TFLOP/s/GPU)"] = teacher
    return row
