"""Recipe sections of training; Megatron's names."""

from dataclasses import dataclass, field
from typing import Optional

LR_DECAY_STYLES = ("cosine", "linear", "constant", "WSD")
LR_WSD_DECAY_STYLES = ("exponential", "linear", "cosine", "minus_sqrt")
RECOMPUTE_GRANULARITIES = ("full", "selective")
RECOMPUTE_METHODS = ("uniform", "block")


@dataclass
class PhaseConfig:
    """A part of the token budget with a shape of its own; null: the section's."""

    tokens: Optional[int] = None  # of this phase; null in the last one: what is left of the section's tokens
    sequence_length: Optional[int] = None
    global_batch_size: Optional[int] = None
    micro_batch_size: Optional[int] = None


@dataclass
class TrainConfig:
    """Next-token training: from scratch (`model.*`), or onward from a checkpoint (`train.load`)."""

    checkpoint: Optional[str] = None  # folder the checkpoints are written to; a run resumes from it
    load: Optional[str] = None  # folder the first weights come from; none: random initialisation
    tokens: int = 0  # budget; the number of iterations follows from it
    global_batch_size: int = 8  # sequences
    micro_batch_size: int = 1  # sequences, for each data-parallel rank
    # [first global batch size, increment, samples over which it grows to global_batch_size]; in the first phase.
    rampup_batch_size: Optional[list[int]] = None
    phases: list[PhaseConfig] = field(default_factory=list)  # one after another; none: the section's shape throughout
    lr: float = 3e-4
    min_lr: float = 3e-5
    lr_decay_style: str = "cosine"  # of LR_DECAY_STYLES
    lr_warmup_iters: int = 0
    lr_warmup_tokens: int = 0  # in place of lr_warmup_iters
    lr_wsd_decay_style: str = "exponential"  # of LR_WSD_DECAY_STYLES: how WSD ends
    lr_wsd_decay_tokens: int = 0  # the last tokens of the budget, over which WSD decays
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    eval_interval: int = 0  # iterations between validations; 0: none on the way
    eval_iters: int = 4  # global batches a validation
    # Iterations between checkpoints, all of which stay; 0: one at the end. null: a tenth of the run, at most 500, each
    # checkpoint in place of the one before.
    save_interval: Optional[int] = None
    loss_chunk_tokens: Optional[int] = None  # tokens whose logits exist at a time; null: a 16th, at least 128
    recompute_granularity: Optional[str] = None  # full: whole layers; selective: their MLPs; null: nothing
    recompute_method: Optional[str] = None  # of full: uniform (its default) or block (model/recompute.py)
    recompute_num_layers: Optional[int] = None  # of full: layers in a row (1), or in all of a chunk for block
    max_skipped_iterations: int = 5  # in a row, without a step since the loss or gradients are NaN; so many end the run


@dataclass
class CorrectConfig(TrainConfig):
    """Teacher correction. The papers: about as many tokens as the distillation, 120 iterations of warm-up, a fifth of
    the teacher's own peak learning rate (arXiv 2408.11796, section 4); the rate here is a fifth of `train`'s default.
    """

    lr: float = 6e-5
    min_lr: float = 6e-6


@dataclass
class LogConfig:
    """Where metrics go. JSONL and the console always; TensorBoard and Weights & Biases by key."""

    interval: int = 10  # iterations between lines on the console; files and dashboards get every iteration
    console: str = "short"  # full: every number that metrics.jsonl has, and the parts of an iteration's time
    timing_log_level: int = 0  # Megatron's: 0 large parts of a step, 1 collectives too, 2 every microbatch
    peak_tflops: Optional[float] = None  # of a device, for the MFU; null: by the device's name, in bf16
    tensorboard: bool = True
    wandb: str = (
        "disabled"  # online uploads, offline writes for `wandb sync`; auto: online when logged in, else offline
    )
    wandb_project: str = "minitron"
