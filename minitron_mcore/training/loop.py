"""The training loop: next-token training and distillation alike, to a token budget, resumable.

One iteration: read the global batch, let the teacher run ahead, Megatron's schedule forward and backward, clip,
DistributedOptimizer step, learning-rate step, metrics, now and then validation and a checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import latest_iteration
from minitron_mcore.checkpoint.store import load_training_state, save_state, training_state
from minitron_mcore.distillation.objective import Objective
from minitron_mcore.errors import InputError
from minitron_mcore.evaluation.lm_loss import mean_loss
from minitron_mcore.model.gpt import LanguageModel
from minitron_mcore.model.schedule import Microbatch, run_schedule
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.training.config import LogConfig, TrainConfig
from minitron_mcore.training.metrics import MetricsLog
from minitron_mcore.training.optimizer import build_optimizer, build_scheduler, wrap_model
from minitron_mcore.training.reader import BatchReader
from minitron_mcore.training.signals import StopRequest


@dataclass
class Progress:
    """What a resumed run goes on from, beside the tensors."""

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


# The least that each number of the section may be.
LEAST = {
    "global_batch_size": 1,
    "micro_batch_size": 1,
    "loss_chunk_tokens": 1,
    "lr_warmup_iters": 0,
    "eval_interval": 0,
    "eval_iters": 0,
    "save_interval": 0,
    "lr": 0,
    "min_lr": 0,
    "weight_decay": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "adam_eps": 0,
    "clip_grad": 0,
}


def count_iterations(train: TrainConfig, sequence_length: int, section: str) -> int:
    """Iterations of the token budget, rounded up to whole global batches. Raises InputError for sizes below 1."""
    if sequence_length < 1:
        raise InputError(f"data.sequence_length={sequence_length} must be at least 1")
    if train.tokens < 1:
        raise InputError(f"{section}.tokens={train.tokens} must be at least 1: it is the budget of training tokens")
    for name, least in LEAST.items():
        value = getattr(train, name)
        if not least <= value < math.inf:
            words = "finite and at least" if isinstance(value, float) else "at least"
            raise InputError(f"{section}.{name}={value} must be {words} {least}")
    return math.ceil(train.tokens / (train.global_batch_size * sequence_length))


def check_train(
    train: TrainConfig, parallel: ParallelConfig, data_parallel: int, iterations: int, section: str
) -> None:
    """Raise InputError for numbers that cannot be trained with."""
    share = train.micro_batch_size * data_parallel
    if train.global_batch_size % share:
        raise InputError(
            f"{section}.global_batch_size={train.global_batch_size} is no multiple of {section}.micro_batch_size="
            f"{train.micro_batch_size} x {data_parallel} data-parallel ranks = {share}"
        )
    microbatches = train.global_batch_size // share
    if parallel.virtual_pipeline and microbatches % parallel.pipeline:
        raise InputError(
            f"{section}.global_batch_size={train.global_batch_size} makes {microbatches} microbatches, which the "
            f"interleaved schedule needs to be a multiple of parallel.pipeline={parallel.pipeline}"
        )
    if not 0 <= train.min_lr <= train.lr:
        raise InputError(f"{section}.min_lr={train.min_lr} must lie between 0 and {section}.lr={train.lr}")
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(train, name) >= 1:
            raise InputError(f"{section}.{name}={getattr(train, name)} must be below 1")
    if train.lr_warmup_iters >= iterations:
        raise InputError(
            f"{section}.lr_warmup_iters={train.lr_warmup_iters} must be less than the {iterations} iterations "
            f"of {section}.tokens={train.tokens}"
        )


@dataclass
class Job:
    """What to train, on what, how, and where it is kept."""

    chunks: list[LanguageModel]
    architecture: Architecture
    objective: Objective
    train: TrainConfig
    log: LogConfig
    runtime: Runtime
    read_train: BatchReader
    read_valid: BatchReader | None
    sequence_length: int
    iterations: int
    precision: str
    folder: Path  # checkpoints and metrics; resumed from where it holds a finished iteration
    describe: Callable[[Progress], None]  # writes what lies beside the weights; the first rank calls
    recipe: dict[str, Any]
    name: str


def fit(job: Job) -> Progress:
    """Train up to `job.iterations`, from the newest checkpoint in the folder if there is one. Every rank calls.

    SIGTERM to any rank saves a checkpoint and raises SystemExit(143).
    """
    train, runtime = job.train, job.runtime
    chunks = wrap_model(job.chunks)
    optimizer = build_optimizer(chunks, train, job.precision)
    scheduler = build_scheduler(optimizer, train, job.iterations)
    progress = Progress()
    if (newest := latest_iteration(job.folder)) is not None:
        progress = Progress(**load_training_state(job.folder, newest, chunks, optimizer, scheduler))
        runtime.print(f"resumed {job.folder} at iteration {progress.iteration} of {job.iterations}")
    if progress.iteration >= job.iterations:
        return progress

    metrics = MetricsLog(job.folder, job.log, name=job.name, recipe=job.recipe)
    runtime.on_main(metrics.open)
    stop = StopRequest()
    try:
        _iterate(job, progress, chunks, optimizer, scheduler, metrics, stop)
    finally:
        stop.restore()
        metrics.close(finished=progress.iteration == job.iterations)
    return progress


def _iterate(
    job: Job,
    progress: Progress,
    chunks: list[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    metrics: MetricsLog,
    stop: StopRequest,
) -> None:
    """From `progress`, which moves along, to the last iteration, or to the one at which a stop was asked for."""
    train, runtime = job.train, job.runtime
    interval = Interval()
    for batch in job.read_train(progress.consumed_samples, job.iterations - progress.iteration):
        row = train_step(chunks, optimizer, scheduler, job.objective, train, batch)
        interval.add(row)
        check_finite(row, progress)
        progress.iteration += 1
        progress.consumed_samples += train.global_batch_size
        progress.consumed_tokens += train.global_batch_size * job.sequence_length
        last = progress.iteration == job.iterations
        row = {"consumed samples": progress.consumed_samples, **row}
        shown = None
        if last or progress.iteration % job.log.interval == 0:
            seconds, losses = interval.report()
            row |= throughput(job, seconds)
            shown = {**row, **losses}
        metrics.write(progress.iteration, job.iterations, row, shown=shown)
        if job.read_valid is not None and (last or _is_due(progress.iteration, train.eval_interval)):
            valid = mean_loss(chunks, job.read_valid(0, train.eval_iters), job.objective)
            progress.metrics = {f"{key} validation": value for key, value in valid.items()}
            metrics.write(
                progress.iteration, job.iterations, progress.metrics, shown=progress.metrics, kind="validation"
            )
        asked_to_stop = stop.on_any_rank()
        if last or asked_to_stop or _is_due(progress.iteration, train.save_interval):
            if runtime.is_main:
                job.describe(progress)
            state = training_state(chunks, optimizer, scheduler, vars(progress).copy(), is_loading=False)
            save_state(job.folder, progress.iteration, state, runtime)
        if asked_to_stop and not last:
            runtime.print(f"SIGTERM: saved {job.folder} at iteration {progress.iteration}; the same command goes on")
            raise SystemExit(143)
        interval.start()


def check_finite(row: dict[str, float], progress: Progress) -> None:
    """Raise FloatingPointError where a loss or the gradient norm is none: before the checkpoint it would spoil."""
    for name, value in row.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"iteration {progress.iteration + 1}, samples from {progress.consumed_samples} on: {name} is {value}; "
                "the newest checkpoint is from before it"
            )


def _is_due(iteration: int, interval: int) -> bool:
    return interval > 0 and iteration % interval == 0


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
    objective.prepare(batch)
    means = run_schedule(chunks, batch, objective.loss)
    means.pop("num_tokens")
    learning_rate = optimizer.param_groups[0]["lr"]
    _, grad_norm, _ = optimizer.step()
    scheduler.step(increment=train.global_batch_size)
    batch_size = float(train.global_batch_size)
    return {**means, "learning-rate": learning_rate, "grad-norm": float(grad_norm), "global batch size": batch_size}


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
