"""The token budget as numbers: iterations, batches, and what cannot be trained with. Pure."""

from __future__ import annotations

import math

from minitron_mcore.errors import InputError
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.training.config import TrainConfig

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
