"""Recipe sections of training; Megatron's names."""

from typing import Annotated, Optional

from pydantic import Field

from minitron_mcore.errors import InputError
from minitron_mcore.keys import OneOf, PathName, key, refuse_idle, section

_OWN = "null: the section's"


@section
class PhaseConfig:
    """A part of the token budget with a shape of its own; null: the section's."""

    tokens: Optional[int] = key(None, "tokens of this phase; null in the last one: what is left", at_least=1)
    sequence_length: Optional[int] = key(None, _OWN, at_least=1)
    global_batch_size: Optional[int] = key(None, _OWN, at_least=1)
    micro_batch_size: Optional[int] = key(None, _OWN, at_least=1, may_change=True)


@section
class NarrowConfig:
    """Numbers narrower than bf16, by Transformer Engine (model/fp8.py, training/adam_state.py); Megatron's names.

    Each of them may change when a run goes on, though it changes how results are rounded: what is saved has the same
    types under all.
    """

    fp8_format: Optional[Annotated[str, OneOf("hybrid", "e4m3")]] = key(
        None, "of the layers' products; hybrid: e4m3, and e5m2 for gradients; null: not in fp8", may_change=True
    )
    fp8_recipe: Annotated[str, OneOf("tensorwise", "delayed", "blockwise")] = key(
        "tensorwise", "scales by a tensor's largest number, by those of steps before, or by blocks", may_change=True
    )
    first_last_layers_bf16: bool = key(False, "keep the first and last layers' products in bf16", may_change=True)
    num_layers_at_start_in_bf16: int = key(1, "with first_last_layers_bf16", at_least=0, may_change=True)
    num_layers_at_end_in_bf16: int = key(1, "with first_last_layers_bf16", at_least=0, may_change=True)
    use_precision_aware_optimizer: bool = key(
        False, "Transformer Engine's Adam, whose state may be narrower than fp32", may_change=True
    )
    main_params_dtype: Annotated[str, OneOf("fp32", "fp16")] = key("fp32", "of the main weights", may_change=True)
    exp_avg_dtype: Annotated[str, OneOf("fp32", "bf16", "fp16", "fp8")] = key(
        "fp32", "of Adam's running mean", may_change=True
    )
    exp_avg_sq_dtype: Annotated[str, OneOf("fp32", "bf16", "fp16", "fp8")] = key(
        "fp32", "of Adam's running variance", may_change=True
    )

    def __post_init__(self) -> None:
        counts = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
        if self.fp8_format is None:
            idle = dict.fromkeys(("fp8_recipe", "first_last_layers_bf16", *counts), "with fp8_format=null")
            refuse_idle(self, idle, "leave it out, or set fp8_format=hybrid")
        if not self.first_last_layers_bf16:
            idle = dict.fromkeys(counts, "with first_last_layers_bf16=false")
            refuse_idle(self, idle, "leave it out, or set first_last_layers_bf16=true")
        elif self.fp8_recipe == "delayed":
            rule = "does not go with fp8_recipe=delayed, whose scales are set for all layers at once"
            raise InputError("first_last_layers_bf16", True, rule, "leave it out, or set fp8_recipe=tensorwise")
        if not self.use_precision_aware_optimizer:
            types = ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
            idle = dict.fromkeys(types, "with use_precision_aware_optimizer=false, whose state is fp32")
            refuse_idle(self, idle, "leave it out, or set use_precision_aware_optimizer=true")
        if self.fp8_format and self.fp8_recipe != "delayed" and self.main_params_dtype == "fp32":
            # megatron-core reads Adam's state there as it lies, without the scales that such types have beside it.
            for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
                if (value := getattr(self, name)) in ("fp16", "fp8"):
                    rule = (
                        f"does not go with fp8_recipe={self.fp8_recipe}, under which a checkpoint would lack its scales"
                    )
                    raise InputError(name, value, rule, "set it to bf16, or fp8_recipe=delayed")


@section
class TrainConfig(NarrowConfig):
    """Next-token training: from scratch (`model.*`), or onward from a checkpoint (`train.load`)."""

    checkpoint: Optional[PathName] = key(None, "folder of the checkpoints; a run resumes from it", may_change=True)
    load: Optional[PathName] = key(
        None, "folder of the first weights; null: drawn (train), student.checkpoint (distill)"
    )
    tokens: int = key(0, "budget; the number of iterations follows from it", at_least=0, budget=True)
    global_batch_size: int = key(8, "sequences of an iteration", at_least=1)
    micro_batch_size: int = key(1, "sequences at a time, on each data-parallel rank", at_least=1, may_change=True)
    rampup_batch_size: Optional[list[Annotated[int, Field(ge=1)]]] = key(
        None, "[first batch size, increment, samples over which it grows to global_batch_size]; in the first phase"
    )
    phases: list[PhaseConfig] = key(
        [], "parts of the budget, one after another; none: the section's shape throughout", budget=True
    )
    lr: float = key(3e-4, "peak learning rate", at_least=0)
    min_lr: float = key(3e-5, "learning rate at the end", at_least=0)
    lr_decay_style: Annotated[str, OneOf("cosine", "linear", "constant", "WSD")] = key("cosine", "how the rate decays")
    lr_warmup_iters: int = key(0, "iterations over which the learning rate grows", at_least=0)
    lr_warmup_tokens: int = key(0, "the warm-up in tokens instead of iterations", at_least=0)
    lr_wsd_decay_style: Annotated[str, OneOf("exponential", "linear", "cosine", "minus_sqrt")] = key(
        "exponential", "how WSD ends"
    )
    lr_wsd_decay_tokens: int = key(0, "the last tokens of the budget, over which WSD decays", at_least=0, budget=True)
    weight_decay: float = key(0.1, "weight decay of the matrices", at_least=0)
    adam_beta1: float = key(0.9, "decay of Adam's running mean", at_least=0, below=1)
    adam_beta2: float = key(0.95, "decay of Adam's running variance", at_least=0, below=1)
    # At 0, or what fp32 rounds to 0, a weight without a gradient becomes 0 / 0.
    adam_eps: float = key(1e-8, "added to Adam's denominator", at_least=1e-30)
    clip_grad: float = key(1.0, "largest norm of the gradient; 0: not clipped", at_least=0)
    eval_interval: int = key(0, "iterations between validations; 0: none on the way", at_least=0, may_change=True)
    eval_iters: int = key(4, "global batches of a validation", at_least=0, may_change=True)
    save_interval: Optional[int] = key(
        None,
        "iterations between checkpoints, all kept; 0: one at the end; null: a tenth of the run, at most 500; one kept",
        at_least=0,
        may_change=True,
    )
    keep_last: Optional[int] = key(
        None, "newest checkpoints that stay; null: all with save_interval, else one", at_least=1, may_change=True
    )
    keep_every: Optional[int] = key(
        None, "at the multiples of so many iterations a checkpoint is saved, and stays", at_least=1, may_change=True
    )
    keep_best: Optional[int] = key(
        None,
        "checkpoints with the lowest validation losses that stay; the link `best` beside them is the first",
        at_least=1,
        may_change=True,
    )
    async_save: bool = key(
        False, "write checkpoints while training goes on; needs host memory for a copy of the state", may_change=True
    )
    on_save_error: Annotated[str, OneOf("stop", "continue")] = key(
        "stop", "what to do if a checkpoint on the way cannot be written; the last one must be", may_change=True
    )
    non_persistent_save_interval: Optional[int] = key(
        None,
        "iterations between local checkpoints; null: none; needs nvidia-resiliency-ext",
        at_least=1,
        may_change=True,
    )
    non_persistent_local_ckpt_dir: Optional[PathName] = key(
        None, "folder of local checkpoints, in a node's memory or scratch, the same path on each", may_change=True
    )
    replication: bool = key(False, "copy each rank's local checkpoint to other ranks too", may_change=True)
    replication_jump: Optional[int] = key(
        None, "ranks that hold a copy lie so far apart; null: the ranks of a node", at_least=1, may_change=True
    )
    replication_factor: int = key(
        2, "ranks that hold each local checkpoint, its own included", at_least=2, may_change=True
    )
    exit_interval: Optional[int] = key(
        None,
        "save and exit at the iterations that are multiples of it; the same command goes on",
        at_least=1,
        may_change=True,
    )
    exit_duration_in_mins: Optional[float] = key(
        None, "save and exit at the end of the iteration in which the process is so old", above=0, may_change=True
    )
    loss_chunk_tokens: Optional[int] = key(
        None, "tokens whose logits exist at a time; null: a 16th, at least 128", at_least=1, may_change=True
    )
    recompute_granularity: Optional[Annotated[str, OneOf("full", "selective")]] = key(
        None, "full: whole layers; selective: their MLPs; null: nothing", may_change=True
    )
    recompute_method: Optional[Annotated[str, OneOf("uniform", "block")]] = key(
        None, "with full; null: uniform (model/recompute.py)", may_change=True
    )
    recompute_num_layers: Optional[int] = key(
        None, "with full: layers in a row (1), or in all of a chunk for block", at_least=1, may_change=True
    )
    overlap_grad_reduce: Optional[bool] = key(
        None, "reduce gradients during backward; null: on CUDA, and with overlap_param_gather", may_change=True
    )
    overlap_param_gather: Optional[bool] = key(
        None, "gather weights under what follows a step; null: on CUDA, with overlap_grad_reduce", may_change=True
    )
    tp_comm_overlap: bool = key(
        False, "exchange states of tensor-parallel ranks during products; needs Transformer Engine", may_change=True
    )
    ddp_bucket_size: Optional[int] = key(
        None, "parameters reduced at a time; null: 40 million, or 1 million a rank", at_least=1, may_change=True
    )
    max_skipped_iterations: int = key(
        5, "so many in a row, skipped because the loss or gradients are NaN, end the run", at_least=1, may_change=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_lr > self.lr:
            raise InputError("min_lr", self.min_lr, f"must lie between 0 and lr={self.lr}", "lower it, or raise lr")
        if self.lr_warmup_iters and self.lr_warmup_tokens:
            rule = f"and lr_warmup_tokens={self.lr_warmup_tokens} both give the warm-up"
            raise InputError("lr_warmup_iters", self.lr_warmup_iters, rule, "leave one of them out")
        if self.lr_decay_style != "WSD":
            idle = {"lr_wsd_decay_tokens": f"with lr_decay_style={self.lr_decay_style}"}
            refuse_idle(self, idle, "leave it out, or set lr_decay_style=WSD")
        if self.overlap_grad_reduce is False:
            if self.overlap_param_gather:
                rule = "needs overlap_grad_reduce, which cuts the weights into the buckets that are gathered"
                raise InputError("overlap_param_gather", True, rule, "set overlap_grad_reduce=true, or leave both out")
            idle = {"ddp_bucket_size": "with overlap_grad_reduce=false, which reduces all gradients at once"}
            refuse_idle(self, idle, "leave it out, or set overlap_grad_reduce=true")
        if self.keep_last is None and self.save_interval:
            idle = {"keep_every": f"with save_interval={self.save_interval} and keep_last=null, where all stay"}
            refuse_idle(self, idle, "give keep_last too, or leave it out")
        if self.keep_best and not (self.eval_interval and self.eval_iters):
            lacking = next(name for name in ("eval_interval", "eval_iters") if not getattr(self, name))
            rule = f"compares validation losses, but with {lacking}=0 there are none on the way"
            raise InputError("keep_best", self.keep_best, rule, f"set {lacking}, or leave keep_best out")
        self._check_local()
        if self.recompute_granularity != "full":
            given = self.recompute_granularity or "null"
            words = f"with recompute_granularity={given}, which recomputes no whole layer"
            idle = dict.fromkeys(("recompute_method", "recompute_num_layers"), words)
            refuse_idle(self, idle, "leave it out, or set recompute_granularity=full")
        if self.rampup_batch_size is not None and len(self.rampup_batch_size) != 3:
            rule = "must be three numbers: first batch size, increment, samples"
            raise InputError("rampup_batch_size", self.rampup_batch_size, rule, "as in [8,8,1000]")
        for number, phase in enumerate(self.phases[:-1]):
            if phase.tokens is None:
                remedy = "only the last phase may leave it out, for what is left"
                raise InputError(f"phases[{number}].tokens", None, "is missing", remedy)

    def _check_local(self) -> None:
        """Raise InputError where the keys of local checkpoints do not go together."""
        interval, folder = "non_persistent_save_interval", "non_persistent_local_ckpt_dir"
        for given, lacking in ((interval, folder), (folder, interval)):
            if getattr(self, given) is not None and getattr(self, lacking) is None:
                raise InputError(
                    given, getattr(self, given), f"needs {lacking}", f"give {lacking} too, or leave it out"
                )
        if self.replication and self.non_persistent_save_interval is None:
            rule = f"copies local checkpoints, of which there are none with {interval}=null"
            raise InputError("replication", True, rule, f"give {interval} too, or leave it out")
        if not self.replication:
            idle = dict.fromkeys(("replication_jump", "replication_factor"), "with replication=false")
            refuse_idle(self, idle, "leave it out, or set replication=true")


@section
class CorrectConfig(TrainConfig):
    """Teacher correction. The papers: about as many tokens as the distillation, 120 iterations of warm-up, a fifth of
    the teacher's own peak learning rate (arXiv 2408.11796, section 4); the rate here is a fifth of `train`'s default.
    """

    lr: float = key(6e-5, "peak learning rate", at_least=0)
    min_lr: float = key(6e-6, "learning rate at the end", at_least=0)


@section
class LogConfig:
    """Where metrics go. JSONL and the console always; TensorBoard and Weights & Biases by key."""

    interval: int = key(10, "iterations between lines on the console; files get every iteration", at_least=1)
    console: Annotated[str, OneOf("short", "full")] = key(
        "short", "full: every number that metrics.jsonl has, and the parts of an iteration's time"
    )
    progress: Annotated[str, OneOf("auto", "bar", "lines", "none")] = key(
        "auto", "of long work: a bar, dated lines now and then, or nothing; auto: a bar on a terminal, else lines"
    )
    libraries: Annotated[str, OneOf("file", "console", "none")] = key(
        "file", "warnings of libraries; file: libraries.log in `output`, or beside a training's metrics.jsonl"
    )
    timing_log_level: int = key(
        0, "Megatron's: 0 large parts of a step, 1 collectives too, 2 every microbatch", at_least=0, at_most=2
    )
    straggler_ratio: float = key(
        1.5, "a line names the slowest rank if it takes so many times as long as others; 0: never", at_least=0
    )
    spike_deviations: float = key(
        10.0, "a line tells of a loss or gradient norm so many deviations above those before; 0: never", at_least=0
    )
    peak_tflops: Optional[float] = key(None, "of a device, for the MFU; null: by the device's name", above=0)
    tensorboard: bool = key(True, "write TensorBoard's files")
    wandb: Annotated[str, OneOf("auto", "online", "offline", "disabled")] = key(
        "disabled", "online uploads; offline writes for `wandb sync`; auto: online when logged in, else offline"
    )
    wandb_project: str = key("minitron", "the project on Weights & Biases")
    wandb_group: Optional[str] = key(None, "the group of its runs; null: the recipe's name")
    wandb_timeout: float = key(
        30.0,
        "seconds that a training waits for Weights & Biases, at its start and at its end, before it goes on",
        above=0,
    )
    prometheus: Optional[PathName] = key(
        None, "file ending in .prom of the newest numbers, for node_exporter; every log.interval; null: none"
    )
