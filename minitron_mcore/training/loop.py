"""The training loop: next-token training and distillation alike, to a token budget, resumable.

One iteration: read the global batch, let the teacher run ahead, Megatron's schedule forward and backward, clip,
DistributedOptimizer step, learning-rate step, metrics, now and then validation and a checkpoint.
"""

from __future__ import annotations

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from minitron_mcore.checkpoint.folder import latest_iteration
from minitron_mcore.checkpoint.store import load_training_state, save_state, training_state
from minitron_mcore.evaluation.lm_loss import mean_loss
from minitron_mcore.training.accounting import Interval, throughput
from minitron_mcore.training.job import Job, Progress
from minitron_mcore.training.metrics import MetricsLog
from minitron_mcore.training.optimizer import build_optimizer, build_scheduler, wrap_model
from minitron_mcore.training.signals import StopRequest
from minitron_mcore.training.step import check_finite, train_step


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


def _is_due(iteration: int, interval: int) -> bool:
    return interval > 0 and iteration % interval == 0
