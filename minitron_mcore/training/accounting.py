"""What a step costs: its time by parts, its memory, and the rates that follow from them."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from minitron_mcore.training.budget import Shape
from minitron_mcore.training.job import Job
from minitron_mcore.training.timers import StepTimers

# Not averaged over the steps of an interval, unlike every other number.
NOT_AVERAGED = ("learning-rate", "grad-norm", "global batch size", "teacher learning-rate", "teacher grad-norm")

# Dense bf16 peak of one device in TFLOP/s, without sparsity, from the makers' data sheets. The first entry counts
# whose words are all in the name that torch.cuda.get_device_name gives.
PEAK_TFLOPS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("GB200",), 2500.0),
    (("B200",), 2250.0),
    (("GH200",), 989.4),
    (("H200", "NVL"), 835.5),
    (("H200",), 989.4),
    (("H100", "PCIe"), 756.0),
    (("H100", "NVL"), 835.5),
    (("H100",), 989.4),
    (("H800",), 989.4),
    (("H20",), 148.0),
    (("A100",), 312.0),
    (("A800",), 312.0),
    (("A30",), 165.0),
    (("A40",), 149.7),
    (("L40S",), 362.0),
    (("L40",), 181.0),
    (("L4",), 121.0),
    (("MI300X",), 1307.4),
)


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of a device by its name; None if the table lacks it."""
    words = device_name.replace("-", " ").split()
    return next((peak for asked, peak in PEAK_TFLOPS if set(asked) <= set(words)), None)


@dataclass(frozen=True)
class Spent:
    """A step's share of an interval on this rank."""

    seconds: float
    means: dict[str, float]  # of the losses, over the steps in which they were finite
    tokens: dict[int, float]  # sequence length -> tokens
    timers: dict[str, float]  # seconds


class Interval:
    """Time (including reading data, without validation and saving) and mean losses since the last line."""

    def __init__(self, timers: StepTimers | None = None) -> None:
        self.timers = timers
        self._clear()
        self.start()

    def _clear(self) -> None:
        self.seconds, self.steps = 0.0, 0
        self._sums: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._tokens: Counter[int] = Counter()
        self._timers: Counter[str] = Counter()

    def start(self) -> None:
        if self.timers is not None:
            self.timers.take()
        self._started = time.perf_counter()

    def add(self, row: dict[str, float], shape: Shape) -> None:
        """End a step that began at `start`; the next one begins."""
        self.seconds += time.perf_counter() - self._started
        self.steps += 1
        self._tokens[shape.sequence_length] += shape.tokens
        if self.timers is not None:
            self._timers.update(self.timers.take())  # type: ignore[arg-type]
        for name, value in row.items():
            if name not in NOT_AVERAGED and math.isfinite(value):
                self._sums[name] += value  # type: ignore[assignment]
                self._counts[name] += 1
        self._started = time.perf_counter()

    def report(self) -> Spent:
        """What a step took; the interval starts afresh."""
        spent = Spent(
            self.seconds / self.steps,
            {name: value / self._counts[name] for name, value in self._sums.items()},
            {length: tokens / self.steps for length, tokens in self._tokens.items()},
            {name: seconds / self.steps for name, seconds in self._timers.items()},
        )
        self._clear()
        return spent


def account(job: Job, timers: StepTimers, spent: Spent) -> tuple[dict[str, float], dict[str, float]]:
    """(rates and memory, the time of each part and its share); every rank calls.

    A time is the slowest rank's; a share is of the time of all ranks, so that the shares add up to 1.
    """
    parts = timers.split(spent.timers, spent.seconds)
    values = [spent.seconds, peak_memory(), *parts.values()]
    sums = torch.tensor(values, dtype=torch.float64, device=torch.cuda.current_device())
    slowest = sums.clone()
    torch.distributed.all_reduce(sums)
    torch.distributed.all_reduce(slowest, op=torch.distributed.ReduceOp.MAX)
    seconds, memory, *longest = slowest.tolist()
    row = throughput(job, seconds, spent.tokens)
    row["peak memory (GiB)"] = memory / 2**30
    whole, _, *totals = sums.tolist()
    times: dict[str, float] = {}
    for name, most, total in zip(parts, longest, totals, strict=True):
        times |= {f"{name}-time": 1000 * most, f"{name}-share": total / whole}
    return row, times


def throughput(job: Job, step_seconds: float, tokens: dict[int, float]) -> dict[str, float]:
    """Tokens and floating-point operations a second, of steps of `tokens` (sequence length -> tokens).

    Operations are those of the models' matrix products (architecture.py): the student forward and backward, its head
    in the loss among them, and the teacher forward with its head, or as the student where it is trained too. What is
    worked out twice does not count, and the whole score matrix of attention does.
    """
    per_gpu = 1 / step_seconds / job.runtime.world_size
    student = sum(job.architecture.training_flops_per_token(length) * count for length, count in tokens.items())
    count = sum(tokens.values())
    row = {
        "elapsed time per iteration (ms)": 1000 * step_seconds,
        "throughput per GPU (TFLOP/s/GPU)": student * per_gpu / 1e12,
        "tokens per second": count / step_seconds,
        "tokens per second per GPU": count * per_gpu,
    }
    if job.objective.running_teacher is not None:
        shape = job.objective.running_teacher.architecture
        passes = shape.forward_flops_per_token if job.teaching is None else shape.training_flops_per_token
        teacher = sum(passes(length) * count for length, count in tokens.items())
        row["student throughput per GPU (TFLOP/s/GPU)"] = row["throughput per GPU (TFLOP/s/GPU)"]
        row["teacher throughput per GPU (TFLOP/s/GPU)"] = teacher * per_gpu / 1e12
        row["throughput per GPU (TFLOP/s/GPU)"] += teacher * per_gpu / 1e12
    peak = job.log.peak_tflops
    if peak is None and torch.cuda.is_available() and job.precision == "bf16":
        peak = peak_tflops(torch.cuda.get_device_name())
    if peak:
        row["model FLOPs utilization (%)"] = 100 * row["throughput per GPU (TFLOP/s/GPU)"] / peak
    return row


def peak_memory() -> float:
    """Bytes: the most that was allocated on this rank's device since the start; on CPU the process's own peak."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024.0 * float(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
