"""Recipe sections of training; Megatron's names."""

from dataclasses import dataclass
from typing import Optional


@dataclass
class TrainConfig:
    """Next-token training: from scratch (`model.*`), or onward from a checkpoint (`train.load`)."""

    checkpoint: Optional[str] = None  # folder the checkpoints are written to; a run resumes from it
    load: Optional[str] = None  # folder the first weights come from; none: random initialisation
    tokens: int = 0  # budget; the number of iterations follows from it
    global_batch_size: int = 8  # sequences
    micro_batch_size: int = 1  # sequences, for each data-parallel rank
    lr: float = 3e-4
    min_lr: float = 3e-5
    lr_decay_style: str = "cosine"  # cosine, linear or constant
    lr_warmup_iters: int = 0
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    eval_interval: int = 0  # iterations between validations; 0: none on the way
    eval_iters: int = 4  # global batches a validation
    save_interval: int = 0  # iterations between checkpoints; 0: one at the end
    loss_chunk_tokens: int = 512  # tokens whose logits exist at a time


@dataclass
class LogConfig:
    """Where metrics go. JSONL and the console always; TensorBoard and Weights & Biases by key."""

    interval: int = 10  # iterations between lines on the console; files and dashboards get every iteration
    tensorboard: bool = True
    wandb: str = "auto"  # auto (online when logged in, else offline), online, offline or disabled
    wandb_project: str = "minitron"
