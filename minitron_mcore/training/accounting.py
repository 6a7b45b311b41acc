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
from minitron_mcore.runtime.pulse import PULSE
from minitron_mcore.training.budget import Shape
from minitron_mcore.training.job import Job

T = TypeVar("T")

# Not averaged over the steps of an interval, unlike every other number.
NOT_AVERAGED = ("learning-rate", "grad-norm", "global batch size", "teacher learning-rate", "teacher grad-norm")
# Megatron's timers of a microbatch's passes, of which the time of other stages and replicas is no part.
OWN = ("forward-compute", "backward-compute")


@dataclass(frozen=True)
class Spent:
    """A step's share of an interval on this rank."""

    seconds: float
    means: dict[str, float]  # of the losses, over the steps in which they were finite
    tokens: dict[int, float]  # sequence length -> tokens
    timers: dict[str, float]  # seconds
    own: float = 0.0  # seconds of reading data and of this rank's own passes


class TellingTimers(Timers):
    """Megatron's, which tell the pulse what is begun or ended, whatever is measured, and add up the time of OWN."""

    def __init__(self, log_level: int) -> None:
        super().__init__(log_level, "max")
        self.own = OwnTime()

    def __call__(self, name: str, log_level: int | None = None) -> Any:
        PULSE.note(name)
        timer = super().__call__(name, log_level)
        return self.own.over(timer) if name in OWN else timer


class OwnTime:
    """The time of this rank's own passes, in which it waits for no other pipeline stage or data-parallel rank. On CUDA
    it is read off events of the device, for which the host does not wait before `take`."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._timer: Any = None
        self._began: Any = None
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def over(self, timer: Any) -> OwnTime:
        """As `timer`, one of Megatron's, which is started and stopped along."""
        self._timer = timer
        return self

    def start(self, barrier: bool = False) -> None:
        self._timer.start(barrier=barrier)
        self._began = self._now()

    def stop(self, barrier: bool = False) -> None:
        began, self._began = self._began, None
        if isinstance(began, float):
            self.seconds += time.perf_counter() - began
        elif began is not None:
            self._pairs.append((began, self._now()))
        self._timer.stop(barrier=barrier)

    def take(self) -> float:
        """Seconds since the last call. On CUDA the device must have done its work, or the host waits for it."""
        for first, last in self._pairs:
            last.synchronize()
            self.seconds += first.elapsed_time(last) / 1000
        self._pairs = []
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    @staticmethod
    def _now() -> Any:
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class StepTimers:
    """The timers of one training run on this rank: time (including reading data, without validation and saving) and
    mean losses since the last line."""

    def __init__(self, log_level: int) -> None:
        self.log_level = log_level
        self.last = 0.0  # seconds of the newest step
        self.timers = TellingTimers(log_level)
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
        self.seconds, self.steps, self.own = 0.0, 0, 0.0
        totals: list[dict[Any, float]] = [defaultdict(float) for _ in range(4)]
        self._sums, self._counts, self._tokens, self._timers = totals

    def start(self) -> None:
        self.take()
        self.timers.own.take()
        self._started = time.perf_counter()

    def add(self, row: dict[str, float], shape: Shape) -> None:
        """End a step that began at `start`; the next one begins."""
        self.last = time.perf_counter() - self._started
        self.seconds += self.last
        self.steps += 1
        self.own += self.timers.own.take()
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
        own = self.own / self.steps + timers.get("batch-generator", 0.0)
        spent = Spent(self.seconds / self.steps, means, tokens, timers, own)
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


def account(job: Job, spent: Spent) -> tuple[dict[str, float], dict[str, float], list[float]]:
    """(rates and memory, the time of each part and its share, `spent.own` by rank); every rank calls.

    A time is the slowest rank's; a share is of the time of all ranks, so that the shares add up to 1.
    """
    parts = split(spent.timers, spent.seconds, job.log.timing_log_level)
    own = [0.0] * job.runtime.world_size
    own[job.runtime.rank] = spent.own
    values = [spent.seconds, peak_memory(), *parts.values(), *own]
    sums = torch.tensor(values, dtype=torch.float64, device=torch.cuda.current_device())
    slowest = sums.clone()
    torch.distributed.all_reduce(sums)
    torch.distributed.all_reduce(slowest, op=torch.distributed.ReduceOp.MAX)
    seconds, memory, *longest = slowest.tolist()[: 2 + len(parts)]
    whole, _, *totals = sums.tolist()
    totals, own = totals[: len(parts)], totals[len(parts) :]
    times: dict[str, float] = {}
    for name, most, total in zip(parts, longest, totals, strict=True):
        times |= {f"{name}-time": 1000 * most, f"{name}-share": total / whole}
    return {**throughput(job, seconds, spent.tokens), "peak memory (GiB)": memory / 2**30}, times, own


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
