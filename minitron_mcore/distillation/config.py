"""Recipe section `distill`: everything of `train`, and the losses."""

from dataclasses import dataclass, field
from typing import Optional

from minitron_mcore.training.config import TrainConfig

LOGIT_LOSSES = ("forward_kl", "reverse_kl", "jensen_shannon", "mse", "cosine")
SITES = ("embedding", "block_output", "mlp_input", "attention_relation")
STATE_LOSSES = ("mse", "cosine")
WEIGHTINGS = ("fixed", "dynamic")


@dataclass
class HiddenStatesConfig:
    """Losses between inner states of teacher and student (arXiv 2407.14679, section 3; facts/papers.md §4)."""

    sites: list[str] = field(default_factory=list)  # of SITES; none: no such loss
    # [[teacher layer, student layer], …], from 0; null: the papers' default, from both depths.
    layers: Optional[list[list[int]]] = None
    loss: str = "mse"  # of STATE_LOSSES; attention relations are always compared by KL
    weighting: str = "dynamic"  # dynamic: weight * L_logits / L_states, recomputed each step; fixed: weight alone
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
    correct_teacher: bool = False  # train the teacher on the same data in the same job (arXiv 2408.11796, section 4)
    hidden_states: HiddenStatesConfig = field(default_factory=HiddenStatesConfig)
