"""One iteration: zero the gradients, let the teacher run ahead, Megatron's schedule, clip, step; or skip the step."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from minitron_mcore.distillation.objective import Objective
from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.runtime.pace import timed
from minitron_mcore.training.budget import Shape


def train_step(
    chunks: list[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    objective: Objective,
    shape: Shape,
    batch: list[Microbatch],
    timers: Any = None,
) -> dict[str, float]:
    """One iteration over a global batch of `shape`; mean losses over its counted tokens. Every rank calls.
    If a loss or the gradient norm is NaN or Inf, weights and optimizer stay as they are; the learning rate still moves
    on, since it follows the tokens used. timers: Megatron's, or None."""
    zero_gradients(chunks, optimizer)
    with timed(timers, "objective", 0):
        means = objective.run(chunks, batch)
    means.pop("num_tokens")
    means["learning-rate"] = optimizer.param_groups[0]["lr"]
    with timed(timers, "optimizer", 0):
        means["grad-norm"] = apply_gradients(optimizer, losses_finite=not not_finite(means))
    scheduler.step(increment=shape.tokens)
    return {**means, "global batch size": float(shape.global_batch_size)}


def zero_gradients(chunks: list[torch.nn.Module], optimizer: MegatronOptimizer) -> None:
    for chunk in chunks:
        cast(DistributedDataParallel, chunk).zero_grad_buffer()
    optimizer.zero_grad()


@torch.no_grad()
def apply_gradients(optimizer: MegatronOptimizer, *, losses_finite: bool) -> float:
    """Clip and step, unless a loss or the gradient norm, the same on all ranks, is NaN or Inf: Megatron's own `step`
    would carry that into every weight. Returns the norm. Every rank calls."""
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if losses_finite and math.isfinite(grad_norm):
        for part in getattr(optimizer, "chained_optimizers", (optimizer,)):
            parameters = part.get_parameters()
            if parameters and part.config.clip_grad > 0:
                clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)
        optimizer.step_with_ready_grads()
    return grad_norm


def not_finite(row: dict[str, float]) -> list[str]:
    """The names in `row` whose values are NaN or Inf: any of them makes the step be skipped."""
    return [name for name, value in row.items() if not math.isfinite(value)]
