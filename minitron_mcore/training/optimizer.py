"""Megatron's DDP, DistributedOptimizer and learning-rate schedule, from the recipe."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from minitron_mcore.distillation.states.projection import finalize_gradients
from minitron_mcore.model.gpt import DTYPES, LanguageModel
from minitron_mcore.training.budget import Timetable
from minitron_mcore.training.config import TrainConfig
from minitron_mcore.training.learning_rate import warmup_tokens


def wrap_model(chunks: list[LanguageModel]) -> list[torch.nn.Module]:
    """Each chunk in Megatron's DDP: fp32 gradients in contiguous buffers, reduce-scattered to the optimizer."""
    wrapped: list[torch.nn.Module] = []
    for index, chunk in enumerate(chunks):
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=False
        )
        chunk.config.finalize_model_grads_func = finalize_gradients
        wrapped.append(DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=index > 0))
    return wrapped


def build_optimizer(chunks: list[torch.nn.Module], train: TrainConfig, precision: str) -> MegatronOptimizer:
    """Adam in Megatron's DistributedOptimizer at every layout, so that a checkpoint resumes at any other layout."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        min_lr=train.min_lr,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_eps=train.adam_eps,
        clip_grad=train.clip_grad,
        bf16=precision == "bf16",
        params_dtype=DTYPES[precision],
        use_distributed_optimizer=True,
    )
    return get_megatron_optimizer(config, chunks, use_gloo_process_groups=False)  # type: ignore[arg-type]


def build_scheduler(optimizer: MegatronOptimizer, train: TrainConfig, timetable: Timetable) -> OptimizerParamScheduler:
    """Warm-up, then decay to `min_lr` at the last iteration; counted in tokens."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.min_lr,
        lr_warmup_steps=warmup_tokens(train, timetable),
        lr_decay_steps=timetable.tokens,
        lr_decay_style=train.lr_decay_style,
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=timetable.tokens,
        wd_incr_style="constant",
        wsd_decay_steps=train.lr_wsd_decay_tokens,
        lr_wsd_decay_style=train.lr_wsd_decay_style,
        # A resumed run may have another budget than its checkpoint: the recipe's schedule counts.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def set_schedule(scheduler: OptimizerParamScheduler, consumed_tokens: int) -> None:
    """Set learning rate and weight decay to those after `consumed_tokens`, whatever unit a checkpoint counted in."""
    scheduler.num_steps = 0
    scheduler.step(increment=consumed_tokens)
