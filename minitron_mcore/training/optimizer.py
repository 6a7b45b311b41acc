"""Megatron's DDP, DistributedOptimizer and learning-rate schedule, from the recipe; and what is saved of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import latest_iteration
from minitron_mcore.checkpoint.store import save_state, training_state
from minitron_mcore.distillation.states.projection import finalize_gradients
from minitron_mcore.files import writing
from minitron_mcore.model.gpt import DTYPES, LanguageModel
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.training.budget import Timetable
from minitron_mcore.training.config import TrainConfig
from minitron_mcore.training.learning_rate import warmup_tokens

# Named in the recipe's section as in Megatron's OptimizerConfig.
ADAM = ("lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad")
Describe = Callable[[], None]


class Trained(NamedTuple):
    """A model and what trains it, in the order in which the functions here and in step.py take them."""

    chunks: list[torch.nn.Module]  # in Megatron's DDP
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    @classmethod
    def of(cls, models: list[LanguageModel], train: TrainConfig, timetable: Timetable, precision: str) -> Trained:
        chunks = wrap_model(models)
        optimizer = build_optimizer(chunks, train, precision)
        return cls(chunks, optimizer, build_scheduler(optimizer, train, timetable))

    def save(
        self, folder: Path, progress: dict[str, Any], runtime: Runtime, architecture: Architecture, describe: Describe
    ) -> None:
        """A checkpoint of the iteration that `progress` names, of a model of `architecture`; all ranks call.

        `describe`, on the first rank, tells of it. What is described is the newest whole iteration: a save that fails
        leaves the word of the one before. Only of the first one the description comes before the weights, which nobody
        could read without.
        """

        def tell() -> None:
            with writing(str(folder)):
                describe()

        state = training_state(*self, progress, is_loading=False)
        is_first = runtime.on_main(lambda: latest_iteration(folder) is None)
        if is_first:
            runtime.on_main(tell)
        save_state(folder, progress["iteration"], state, runtime, architecture)
        if not is_first:
            runtime.on_main(tell)


def wrap_model(chunks: list[LanguageModel]) -> list[torch.nn.Module]:
    """Each chunk in Megatron's DDP: fp32 gradients in contiguous buffers, reduce-scattered to the optimizer."""
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    wrapped: list[torch.nn.Module] = []
    for index, chunk in enumerate(chunks):
        chunk.config.finalize_model_grads_func = finalize_gradients
        wrapped.append(DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=index > 0))
    return wrapped


def build_optimizer(chunks: list[torch.nn.Module], train: TrainConfig, precision: str) -> MegatronOptimizer:
    """Adam in Megatron's DistributedOptimizer at every layout, so that a checkpoint resumes at any other layout."""
    adam: dict[str, Any] = {name: getattr(train, name) for name in ADAM}
    types: dict[str, Any] = {"bf16": precision == "bf16", "params_dtype": DTYPES[precision]}
    config = OptimizerConfig(optimizer="adam", use_distributed_optimizer=True, **types, **adam)
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
