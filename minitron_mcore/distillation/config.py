"""Recipe section `distill`: everything of `train`, and the loss."""

from dataclasses import dataclass

from minitron_mcore.training.config import TrainConfig


@dataclass
class DistillConfig(TrainConfig):
    """Training of the student from the teacher's output distribution (arXiv 2407.14679, section 3)."""

    temperature: float = 1.0  # the papers' best of {0.1, 0.5, 1, 3}
    kd_weight: float = 1.0  # of the forward KL on the logits, times temperature squared
    lm_weight: float = 0.0  # of the next-token loss; logged at every step whatever its weight
