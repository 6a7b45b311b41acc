"""Recipe sections of pruning: the student's shape, and how a plan chooses."""

from dataclasses import dataclass, field
from typing import Optional


@dataclass
class StudentConfig:
    """The student. Megatron's field names; what is left out stays the teacher's."""

    checkpoint: Optional[str] = None  # folder the pruned checkpoint is written to
    num_layers: Optional[int] = None
    hidden_size: Optional[int] = None
    ffn_hidden_size: Optional[int] = None
    num_attention_heads: Optional[int] = None
    num_query_groups: Optional[int] = None  # KV groups; left out with the heads given: all stay
    layers: Optional[list[int]] = None  # the teacher's layers that stay, one by one, whatever their scores
    # By the names above: share of the teacher's size that stays, as in hidden_size: 0.75, rounded to the nearest
    # multiple of prune.divisible_by (hidden_size and ffn_hidden_size) and of what tensor parallelism needs.
    ratios: dict[str, float] = field(default_factory=dict)


@dataclass
class PruneConfig:
    """How the plan chooses."""

    layers: str = "scattered"  # scattered (those that cost least to leave out) or contiguous (the block that does)
    # What leaving a layer out costs: block_influence, or lm_loss, logit_mse, normalized_logit_mse, accuracy, where the
    # scores hold them (importance.depth_metrics).
    depth_metric: str = "block_influence"
    variant: Optional[str] = None  # which of the scores' aggregations, as l2/mean/pre_activation; none: their first
    divisible_by: int = 1  # what must divide a pruned hidden_size and ffn_hidden_size; tensor cores like 64
    # What kept heads take up of dropped ones (arXiv 2407.14679, section 2.3): none, paper (head - dropped is added) or
    # laco (dropped - head); in which of query, output and, where each KV group has one head, key and value.
    head_residual: str = "none"
    residual_matrices: list[str] = field(default_factory=lambda: ["query", "output"])
    # In how many steps `run` prunes, scoring anew in each (arXiv 2407.14679: as good as one shot, by table 14); for how
    # many tokens it trains between them, as section distill says, and on what: distillation or next_token.
    steps: int = 1
    step_tokens: int = 0
    step_loss: str = "distillation"
    overwrite: bool = False
