"""Megatron's DDP, DistributedOptimizer and learning-rate schedule from the recipe, what is saved of them, and one
iteration: zero the gradients, let the teacher run ahead, Megatron's schedule, clip, step; or skip the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import resumed_iteration
from minitron_mcore.checkpoint.store import SaveUnderWay, save_state, training_state
from minitron_mcore.distillation.objective import Objective
from minitron_mcore.distillation.states.projection import finalize_gradients
from minitron_mcore.files import writing
from minitron_mcore.model.gpt import DTYPES, LanguageModel
from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.runtime.groups import optimizer_instances
from minitron_mcore.runtime.overlap import (
    NOTHING,
    Overlap,
    adopt_added,
    adopt_head,
    finish_gathering,
    prepare,
    start_gathering,
)
from minitron_mcore.runtime.pace import timed
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.training.adam_state import AdamState
from minitron_mcore.training.budget import Shape, Timetable
from minitron_mcore.training.config import TrainConfig
from minitron_mcore.training.learning_rate import warmup_tokens

# Named in the recipe's section as in Megatron's OptimizerConfig.
ADAM = ("lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad")
# What Megatron calls the types of the optimizer's state; Transformer Engine keeps fp8 as bytes, beside a scale.
STATE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.uint8}
Describe = Callable[[], None]


class Trained(NamedTuple):
    """A model and what trains it, in the order in which checkpoint/store.py takes them."""

    chunks: list[torch.nn.Module]  # in Megatron's DDP
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    @classmethod
    def of(cls, models: list[LanguageModel], train: TrainConfig, timetable: Timetable) -> Trained:
        chunks = wrap_model(models, overlap_of(train))
        optimizer = build_optimizer(chunks, train, "bf16" if models[0].config.bf16 else "fp32")
        return cls(chunks, optimizer, build_scheduler(optimizer, train, timetable))

    def apply_gradients(self, *, losses_finite: bool) -> float:
        """`apply_gradients` below; overlapped weights are then on their way to all ranks. Every rank calls."""
        grad_norm = apply_gradients(self.optimizer, losses_finite=losses_finite)
        start_gathering(self.chunks)
        return grad_norm

    def zero_gradients(self) -> None:
        for chunk in self.chunks:
            cast(DistributedDataParallel, chunk).zero_grad_buffer()
        self.optimizer.zero_grad()

    def save(
        self, folder: Path, progress: dict[str, Any], runtime: Runtime, architecture: Architecture, describe: Describe
    ) -> None:
        """A checkpoint of the iteration that `progress` names, of a model of `architecture`; all ranks call.

        `describe`, on the first rank, tells of it. What is described is the newest whole iteration: a save that fails
        leaves the word of the one before. Only of the first one the description comes before the weights, which nobody
        could read without.
        """

        state, tell = self._described(folder, progress, runtime, describe)
        save_state(folder, progress["iteration"], state, runtime, architecture)
        tell()

    def begin_save(
        self, folder: Path, progress: dict[str, Any], runtime: Runtime, architecture: Architecture, describe: Describe
    ) -> SaveUnderWay:
        """`save`, which another process goes on with: to be finished, by all ranks, before the next one begins.

        `describe` may be called when it is finished: it must still tell of the iteration that `progress` names.
        """
        state, tell = self._described(folder, progress, runtime, describe)
        return SaveUnderWay(folder, progress["iteration"], state, runtime, architecture, then=tell)

    def _described(
        self, folder: Path, progress: dict[str, Any], runtime: Runtime, describe: Describe
    ) -> tuple[Any, Callable[[], None]]:
        """The state to save, and what to call on all ranks when it is saved."""

        def tell() -> None:
            with writing(str(folder)):
                describe()

        finish_gathering(self.chunks)
        state = training_state(*self, progress, is_loading=False)

        def look() -> bool:
            with writing(str(folder)):
                return resumed_iteration(folder) is None

        is_first = runtime.on_main(look)
        if is_first:
            runtime.on_main(tell)
        return state, lambda: None if is_first else runtime.on_main(tell)


def overlap_of(train: TrainConfig) -> Overlap:
    """What the section asks for; by default everything on CUDA, and nothing on the CPU, where nothing is won by it.
    Weights are gathered by the buckets of the gradients, so not alone."""
    on_cuda, reduce, gather = torch.cuda.is_available(), train.overlap_grad_reduce, train.overlap_param_gather
    grad_reduce = on_cuda or bool(gather) if reduce is None else reduce
    param_gather = on_cuda and grad_reduce if gather is None else gather
    return Overlap(grad_reduce, param_gather, train.ddp_bucket_size)


def wrap_model(chunks: list[LanguageModel], overlap: Overlap = NOTHING) -> list[torch.nn.Module]:
    """Each chunk in Megatron's DDP: fp32 gradients in contiguous buffers, reduce-scattered to the optimizer."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        num_distributed_optimizer_instances=optimizer_instances(),
        **overlap.ddp_fields(),
    )
    wrapped: list[torch.nn.Module] = []
    for index, chunk in enumerate(chunks):
        chunk.config.finalize_model_grads_func = finalize_gradients
        wrapped.append(DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=index > 0))
        if chunk.pre_process:
            adopt_added(wrapped[-1], chunk.embedding.word_embeddings.weight)
        if chunk.post_process and (overlap.grad_reduce or overlap.param_gather):
            adopt_head(wrapped[-1], chunk.head_weight(), chunk.decoder.final_layernorm)
    prepare(wrapped, chunks[0].config)
    return wrapped


def build_optimizer(chunks: list[torch.nn.Module], train: TrainConfig, precision: str) -> MegatronOptimizer:
    """Adam in Megatron's DistributedOptimizer at every layout, so that a checkpoint resumes at any other layout."""
    adam: dict[str, Any] = {name: getattr(train, name) for name in ADAM}
    types: dict[str, Any] = {"bf16": precision == "bf16", "params_dtype": DTYPES[precision]}
    gather = {"overlap_param_gather": cast(Any, chunks[0]).ddp_config.overlap_param_gather}
    state = AdamState.of(train).megatron_fields(STATE_DTYPES)
    state |= {"fp8_recipe": train.fp8_recipe if train.fp8_format else None}
    config = OptimizerConfig(optimizer="adam", use_distributed_optimizer=True, **types, **adam, **gather, **state)
    optimizer: MegatronOptimizer = get_megatron_optimizer(config, chunks, use_gloo_process_groups=False)  # type: ignore[arg-type]
    for part in getattr(optimizer, "chained_optimizers", (optimizer,)):
        if isinstance(part.optimizer, torch.optim.Adam):
            _in_one_pass(part.optimizer)
    return optimizer


def _in_one_pass(adam: torch.optim.Adam) -> None:
    """Let torch's Adam step in its fused kernel, which on the CPU it does not choose by itself. Only while it steps: in
    a checkpoint the choice would go along to another device."""

    def choose(*unused: Any, fused: bool | None) -> None:
        for group in adam.param_groups:
            group["fused"] = fused if all(parameter.is_cpu for parameter in group["params"]) else None

    adam.register_step_pre_hook(partial(choose, fused=True))
    adam.register_step_post_hook(partial(choose, fused=None))


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


def train_step(
    trained: Trained,
    objective: Objective,
    shape: Shape,
    batch: list[Microbatch],
    timers: Any = None,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """One iteration over a global batch of `shape`; mean losses over its counted tokens. Every rank calls.
    If a loss or the gradient norm is NaN or Inf, weights and optimizer stay as they are; the learning rate still moves
    on, since it follows the tokens used.

    timers: Megatron's, or None. between: called once the losses are known and before the host waits for the gradient
    norm, so that what it begins on the device is done when the step returns."""
    chunks, optimizer, scheduler = trained
    trained.zero_gradients()
    with timed(timers, "objective", 0):
        means = objective.run(chunks, batch)
    means.pop("num_tokens")
    means = objective.reported(means)
    between()
    means["learning-rate"] = optimizer.param_groups[0]["lr"]
    with timed(timers, "optimizer", 0):
        means["grad-norm"] = trained.apply_gradients(losses_finite=not not_finite(means))
    scheduler.step(increment=shape.tokens)
    return {**means, "global batch size": float(shape.global_batch_size)}


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
                apart = getattr(part.config, "use_precision_aware_optimizer_no_fp8_or_ds_fp8", False)
                norms = {"max_norm": part.config.clip_grad, "total_norm": grad_norm}
                clip_grad_by_total_norm_fp32(parameters, **norms, use_decoupled_grad=apart)
        optimizer.step_with_ready_grads()
    return grad_norm


def not_finite(row: dict[str, float]) -> list[str]:
    """The names in `row` whose values are NaN or Inf: any of them makes the step be skipped."""
    return [name for name, value in row.items() if not math.isfinite(value)]
