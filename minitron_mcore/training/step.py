"""One iteration: zero the gradients, let the teacher run ahead, Megatron's schedule, clip, step."""

from __future__ import annotations

import math
from typing import cast

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from minitron_mcore.distillation.objective import Objective
from minitron_mcore.model.schedule import Microbatch
from minitron_mcore.training.config import TrainConfig
from minitron_mcore.training.job import Progress


def train_step(
    chunks: list[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    objective: Objective,
    train: TrainConfig,
    batch: list[Microbatch],
) -> dict[str, float]:
    """One iteration over a global batch; mean losses over its counted tokens. Every rank calls."""
    for chunk in chunks:
        cast(DistributedDataParallel, chunk).zero_grad_buffer()
    optimizer.zero_grad()
    means = objective.run(chunks, batch)
    means.pop("num_tokens")
    learning_rate = optimizer.param_groups[0]["lr"]
    _, grad_norm, _ = optimizer.step()
    scheduler.step(increment=train.global_batch_size)
    batch_size = float(train.global_batch_size)
    return {**means, "learning-rate": learning_rate, "grad-norm": float(grad_norm), "global batch size": batch_size}


def check_finite(row: dict[str, float], progress: Progress) -> None:
    """Raise FloatingPointError where a loss or the gradient norm is none: before the checkpoint it would spoil."""
    for name, value in row.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"iteration {progress.iteration + 1}, samples from {progress.consumed_samples} on: {name} is {value}; "
                "the newest checkpoint is from before it"
            )
