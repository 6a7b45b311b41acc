"""Recipe section `distill`: everything of `train`, and the losses."""

from dataclasses import dataclass, field
from typing import Optional

from minitron_mcore.training.config import TrainConfig

LOGIT_LOSSES = ("forward_kl", "reverse_kl", "jensen_shannon", "mse", "cosine")
SITES = ("embedding", "block_output", "mlp_input", "attention_relation")
STATE_LOSSES = ("mse", "cosine")
WEIGHTINGS = ("fixed", "dynamic")
LEAST_CHUNK = 128
# fp32 numbers of one buffer of an attention relation's sweep over rows, at most; it has about five of them.
RELATION_BUFFER = 1 << 24


def default_chunk_tokens(tokens: int) -> int:
    """Of a microbatch's tokens, those whose logits exist at a time, where `loss_chunk_tokens` is left out.

    Two fp32 buffers of it are 0.5 bytes for each token and vocabulary entry from 2048 tokens on (0.75 where a matrix
    product on the CPU copies one). Larger chunks read and write the head and its gradient fewer times.
    """
    return max(LEAST_CHUNK, tokens // 16)


CACHE_METHODS = ("sampled", "top_k")
CACHE_TYPES = ("fp16", "fp32")


@dataclass
class HiddenStatesConfig:
    """Losses between inner states of teacher and student (arXiv 2407.14679, section 3)."""

    sites: list[str] = field(default_factory=list)  # of SITES; none: no such loss
    # [[teacher layer, student layer], …], from 0; null: the papers' default, from both depths.
    layers: Optional[list[list[int]]] = None
    loss: str = "mse"  # of STATE_LOSSES; attention relations are always compared by KL
    relation_heads: int = 0  # heads of the attention relations; 0: what divides both models' query groups
    weighting: str = "dynamic"  # dynamic: weight * L_logits / L_states, bounded, at each step; fixed: weight
    weight: float = 1.0


@dataclass
class DistillConfig(TrainConfig):
    """Training of the student from the teacher's output distribution (arXiv 2407.14679, section 3)."""

    teacher: Optional[str] = None  # null: the model teacher.checkpoint, resident; cache:DIR, what `cache` wrote
    logit_loss: str = "forward_kl"  # of LOGIT_LOSSES
    jensen_shannon_mix: float = 0.5  # beta: the mixture is beta teacher + (1 - beta) student
    temperature: float = 1.0  # the papers' best of {0.1, 0.5, 1, 3}
    kd_weight: float = 1.0  # of the logit loss, times temperature squared
    lm_weight: float = 0.0  # of the next-token loss; logged at every step whatever its weight
    top_k: int = 0  # of the teacher's logits, the rest as one tail bucket; 0: the whole vocabulary
    recompute_loss: bool = False  # the loss's sweep once more in backward, storing nothing between
    teacher_window: int = 0  # microbatches the teacher runs ahead, for a bound on memory; 0: the whole global batch
    check_teacher: bool = True  # before the first step, by a microbatch: its weights, its loss, its loss from itself
    correct_teacher: bool = False  # train the teacher on the same data in the same job (arXiv 2408.11796, section 4)
    hidden_states: HiddenStatesConfig = field(default_factory=HiddenStatesConfig)


@dataclass
class CacheConfig:
    """The teacher's targets written to files, of the samples that `distill` will train on."""

    folder: Optional[str] = None  # written by `cache`, read with distill.teacher=cache:FOLDER
    method: str = "sampled"  # of CACHE_METHODS; sampled: drawn at random, unbiased; top_k: the most probable ids
    draws: int = 50  # sampled: mean number of draws a token; some 12 different ids do (arXiv 2503.16870)
    proposal_temperature: float = 1.0  # sampled: draws are from softmax(logits / (temperature * this))
    top_k: int = 100  # top_k: ids a token, the rest as one tail bucket; 0: the whole vocabulary
    temperature: Optional[float] = None  # of the teacher's distribution; null: distill.temperature
    dtype: str = "fp16"  # of CACHE_TYPES: the stored log-probabilities; counts of draws are exact
    num_samples: Optional[int] = None  # null: as many as distill.tokens takes
    micro_batch_size: int = 1
    chunk_tokens: int = 128  # tokens whose logits exist at a time
    shard_samples: int = 1024  # of a file; what a killed run may lose
