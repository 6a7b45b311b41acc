"""What a step costs: where its time goes, its memory, and the rates that follow from them.

Its time is read off Megatron's Timers on the model's and the optimizer's config, divided into parts that do not overlap
and add up to the step. `log.timing_log_level`, as Megatron's: 0 times the four large parts, 1 the collectives of
gradients and parameters too, 2 every microbatch. A timer waits for the device at both ends, so level 2 costs time on
CUDA (work is no longer queued ahead, and transfers between pipeline stages overlap with nothing).
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.timers import Timers

from minitron_mcore.distillation.objective import Objective
from minitron_mcore.model.gpt import unwrap
from minitron_mcore.runtime.devices import peak_tflops
from minitron_mcore.runtime.pace import timed
from minitron_mcore.training.budget import Shape
from minitron_mcore.training.job import Job

T = TypeVar("T")

# Not averaged over the steps of an interval, unlike every other number.
NOT_AVERAGED = ("learning-rate", "grad-norm", "global batch size", "teacher learning-rate", "teacher grad-norm")


@dataclass(frozen=True)
class Spent:
    """A step's share of an interval on this rank."""

    seconds: float
    means: dict[str, float]  # of the losses, over the steps in which they were finite
    tokens: dict[int, float]  # sequence length -> tokens
    timers: dict[str, float]  # seconds


class StepTimers:
    """The timers of one training run on this rank: time (including reading data, without validation and saving) and
    mean losses since the last line."""

    def __init__(self, log_level: int) -> None:
        self.log_level = log_level
        self.last = 0.0  # seconds of the newest step
        self.timers = Timers(log_level, "max")
        self._clear()

    def attach(self, chunks: list[torch.nn.Module], optimizer: MegatronOptimizer, objective: Objective) -> None:
        """Make the objective and Megatron's schedules, gradient synchronisation and optimizer use these timers."""
        configs = [unwrap(chunk).config for chunk in chunks]
        configs += [part.config for part in (optimizer, *getattr(optimizer, "chained_optimizers", ()))]
        for user in (objective, *configs):
            user.timers = self.timers

    def batches(self, source: Iterator[T]) -> Iterator[T]:
        """Yield from `source`; the wait for each batch is timed as `batch-generator`."""
        while True:
            with timed(self.timers, "batch-generator", 0):
                batch = next(source, None)
            if batch is None:
                return
            yield batch

    def take(self) -> dict[str, float]:
        """Seconds of each timer since the last call, and reset them."""
        return {name: timer.elapsed(reset=True) for name, timer in self.timers._timers.items()}

    def _clear(self) -> None:
        self.seconds, self.steps = 0.0, 0
        totals: list[dict[Any, float]] = [defaultdict(float) for _ in range(4)]
        self._sums, self._counts, self._tokens, self._timers = totals

    def start(self) -> None:
        self.take()
        self._started = time.perf_counter()

    def add(self, row: dict[str, float], shape: Shape) -> None:
        """End a step that began at `start`; the next one begins."""
        self.last = time.perf_counter() - self._started
        self.seconds += self.last
        self.steps += 1
        self._tokens[shape.sequence_length] += shape.tokens
        for name, seconds in self.take().items():
            self._timers[name] += seconds
        for name, value in row.items():
            if name not in NOT_AVERAGED and math.isfinite(value):
                self._sums[name] += value
                self._counts[name] += 1
        self._started = time.perf_counter()

    def report(self) -> Spent:
        """What a step took; the interval starts afresh."""
        means = {name: value / self._counts[name] for name, value in self._sums.items()}
        tokens, timers = ({key: n / self.steps for key, n in sums.items()} for sums in (self._tokens, self._timers))
        spent = Spent(self.seconds / self.steps, means, tokens, timers)
        self._clear()
        return spent


def split(seconds: dict[str, float], whole: float, log_level: int) -> dict[str, float]:
    """`seconds` of nested timers in a time of `whole` seconds -> seconds of each part, in the order in which they are
    shown: parts that do not overlap and add up to `whole`."""

    def total(*endings: str) -> float:
        return sum(value for name, value in seconds.items() if name.endswith(endings))

    # Megatron's timers of collectives: of gradients (level 1), and between pipeline stages (level 2).
    gradients, transfers = total("grads-sync", "grads-all-reduce"), total("-send", "-recv")
    spent = defaultdict(float, seconds)
    parts = {name: spent[name] for name in ("batch-generator", "teacher-forward")}
    if log_level == 2:
        # The loss runs at the end of the last stage's forward.
        parts["forward-compute"] = spent["forward-compute"] - spent["logits-loss"]
        parts |= {name: spent[name] for name in ("logits-loss", "backward-compute")}
    else:  # the student's schedule, and what is around it
        parts["forward-backward"] = spent["objective"] - spent["teacher-forward"] - gradients
    if log_level > 0:
        parts["communication"] = gradients + transfers + spent["params-all-gather"]
    parts["optimizer"] = spent["optimizer"] - spent["params-all-gather"]
    return {**parts, "other": whole - sum(parts.values())}


def split_line(row: dict[str, Any]) -> str:
    """The console's line of the parts in `row`: milliseconds a step on the slowest rank, share of all ranks' time."""
    names = [key.removesuffix("-time") for key in row if key.endswith("-time")]
    shown = [name for name in names if name != "teacher-forward" or row[f"{name}-time"]]  # `train` has no teacher
    cells = [f"{name}: {row[f'{name}-time']:.1f} ({row[f'{name}-share']:.1%})" for name in shown]
    return " time of an iteration (ms, slowest rank; share of all) | " + " | ".join(cells) + " |"


def account(job: Job, spent: Spent) -> tuple[dict[str, float], dict[str, float]]:
    """(rates and memory, the time of each part and its share); every rank calls.

    A time is the slowest rank's; a share is of the time of all ranks, so that the shares add up to 1.
    """
    parts = split(spent.timers, spent.seconds, job.log.timing_log_level)
    values = [spent.seconds, peak_memory(), *parts.values()]
    sums = torch.tensor(values, dtype=torch.float64, device=torch.cuda.current_device())
    slowest = sums.clone()
    torch.distributed.all_reduce(sums)
    torch.distributed.all_reduce(slowest, op=torch.distributed.ReduceOp.MAX)
    seconds, memory, *longest = slowest.tolist()
    whole, _, *totals = sums.tolist()
    times: dict[str, float] = {}
    for name, most, total in zip(parts, longest, totals, strict=True):
        times |= {f"{name}-time": 1000 * most, f"{name}-share": total / whole}
    return {**throughput(job, seconds, spent.tokens), "peak memory (GiB)": memory / 2**30}, times


def throughput(job: Job, step_seconds: float, tokens: dict[int, float]) -> dict[str, float]:
    """Tokens and floating-point operations a second, of steps of `tokens` (sequence length -> tokens).

    Operations are those of the models' matrix products (architecture.py): the student forward and backward, its head
    in the loss among them, and the teacher forward with its head, or as the student where it is trained too. What is
    worked out twice does not count, and the whole score matrix of attention does.
    """
    per_gpu = 1 / step_seconds / job.runtime.world_size
    tokens = {length // job.data.sides: count for length, count in tokens.items()}
    student = sum(job.architecture.training_flops_per_token(length) * count for length, count in tokens.items())
    count = sum(tokens.values())
    total = "throughput per GPU (TFLOP/s/GPU)"
    row = {
        "elapsed time per iteration (ms)": 1000 * step_seconds,
        total: student * per_gpu / 1e12,
        "tokens per second": count / step_seconds,
        "tokens per second per GPU": count * per_gpu,
    }
    if job.objective.running_teacher is not None:
        shape = job.objective.running_teacher.architecture
        passes = shape.forward_flops_per_token if job.teaching is None else shape.training_flops_per_token
        teacher = sum(passes(length) * count for length, count in tokens.items()) * per_gpu / 1e12
        row |= {f"student {total}": row[total], f"teacher {total}": teacher, total: row[total] + teacher}
    peak = job.log.peak_tflops
    if peak is None and torch.cuda.is_available() and job.precision == "bf16":
        peak = peak_tflops(torch.cuda.get_device_name(), "fp8" if job.train.fp8_format else "bf16")
    if peak:
        row["model FLOPs utilization (%)"] = 100 * row[total] / peak
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
