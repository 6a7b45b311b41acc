"""Where the time of a step goes: Megatron's Timers on the model's and the optimizer's config, divided into parts that
do not overlap and add up to the step.

`log.timing_log_level`, as Megatron's: 0 times the four large parts, 1 the collectives of gradients and parameters too,
2 every microbatch. A timer waits for the device at both ends, so level 2 costs time on CUDA (work is no longer queued
ahead, and transfers between pipeline stages overlap with nothing).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.timers import Timers

from minitron_mcore.distillation.objective import Objective
from minitron_mcore.model.gpt import unwrap
from minitron_mcore.runtime.pace import timed

T = TypeVar("T")

# Megatron's timers of collectives: of gradients and parameters (level 1), and between pipeline stages (level 2).
GRADIENT_COLLECTIVES = (
    "all-grads-sync",
    "conditional-embedder-grads-all-reduce",
    "non-tensor-parallel-grads-all-reduce",
    "embedding-grads-all-reduce",
)
PIPELINE_TRANSFERS = (
    "forward-recv",
    "forward-send",
    "backward-recv",
    "backward-send",
    "forward-send-backward-recv",
    "backward-send-forward-recv",
    "forward-send-forward-recv",
    "backward-send-backward-recv",
    "forward-backward-send-forward-backward-recv",
)
# The parts of a step, in the order in which they are shown; each level has its own.
PARTS = (
    ("batch-generator", "teacher-forward", "forward-backward", "optimizer", "other"),
    ("batch-generator", "teacher-forward", "forward-backward", "communication", "optimizer", "other"),
    (
        "batch-generator",
        "teacher-forward",
        "forward-compute",
        "logits-loss",
        "backward-compute",
        "communication",
        "optimizer",
        "other",
    ),
)


class StepTimers:
    """The timers of one training run on this rank."""

    def __init__(self, log_level: int) -> None:
        self.log_level = log_level
        self.timers = Timers(log_level, "max")

    @property
    def parts(self) -> tuple[str, ...]:
        return PARTS[self.log_level]

    def attach(self, chunks: list[torch.nn.Module], optimizer: MegatronOptimizer, objective: Objective) -> None:
        """Make the objective and Megatron's schedules, gradient synchronisation and optimizer use these timers."""
        objective.timers = self.timers
        for chunk in chunks:
            unwrap(chunk).config.timers = self.timers
        for part in (optimizer, *getattr(optimizer, "chained_optimizers", ())):
            part.config.timers = self.timers

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

    def split(self, seconds: dict[str, float], whole: float) -> dict[str, float]:
        """`seconds` of each timer in a time of `whole` seconds -> seconds of each part, which add up to `whole`."""
        return split(seconds, whole, self.log_level)


def split(seconds: dict[str, float], whole: float, log_level: int) -> dict[str, float]:
    """Nested timers as parts that do not overlap and add up to `whole`."""

    def total(*names: str) -> float:
        return sum(seconds.get(name, 0.0) for name in names)

    student = total("objective") - total("teacher-forward")  # the student's schedule, and what is around it
    parts = {"batch-generator": total("batch-generator"), "teacher-forward": total("teacher-forward")}
    if log_level == 2:
        # The loss runs at the end of the last stage's forward.
        parts["forward-compute"] = total("forward-compute") - total("logits-loss")
        parts["logits-loss"] = total("logits-loss")
        parts["backward-compute"] = total("backward-compute")
    else:
        parts["forward-backward"] = student - total(*GRADIENT_COLLECTIVES)
    if log_level > 0:
        parts["communication"] = total(*GRADIENT_COLLECTIVES, *PIPELINE_TRANSFERS, "params-all-gather")
    parts["optimizer"] = total("optimizer") - total("params-all-gather")
    parts["other"] = whole - sum(parts.values())
    return {name: parts[name] for name in PARTS[log_level]}


def split_line(row: dict[str, Any], parts: tuple[str, ...]) -> str:
    """The console's line of the parts in `row`: milliseconds a step on the slowest rank, share of all ranks' time."""
    shown = [name for name in parts if name != "teacher-forward" or row[f"{name}-time"]]  # `train` has no teacher
    cells = [f"{name}: {row[f'{name}-time']:.1f} ({row[f'{name}-share']:.1%})" for name in shown]
    return " time of an iteration (ms, slowest rank; share of all) | " + " | ".join(cells) + " |"
