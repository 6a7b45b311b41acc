"""Recipe sections of pruning: the student's shape, and how a plan chooses."""

import dataclasses
from typing import Annotated, Optional

from minitron_mcore.errors import InputError
from minitron_mcore.importance.config import DepthMetric
from minitron_mcore.keys import OneOf, PathName, key, section

# How kept heads take up dropped ones, and in which rows of linear_qkv (weight, bias) and columns of linear_proj.
RESIDUALS = ("paper", "laco")
RESIDUAL_MATRICES = ("query", "key", "value", "output")

LayerChoice = Annotated[str, OneOf("scattered", "contiguous")]
HeadResidual = Annotated[str, OneOf("none", *RESIDUALS)]
_SIZE = "null: the teacher's"


@section
class StudentConfig:
    """The student. Megatron's field names; what is left out stays the teacher's."""

    checkpoint: Optional[PathName] = key(None, "folder the pruned checkpoint is written to", may_change=True)
    num_layers: Optional[int] = key(None, _SIZE, at_least=1)
    hidden_size: Optional[int] = key(None, _SIZE, at_least=1)
    ffn_hidden_size: Optional[int] = key(None, _SIZE, at_least=1)
    num_attention_heads: Optional[int] = key(None, _SIZE, at_least=1)
    num_query_groups: Optional[int] = key(None, "KV groups; null: the teacher's, with fewer heads in each", at_least=1)
    layers: Optional[list[int]] = key(None, "the teacher's layers that stay, one by one, whatever their scores")
    ratios: dict[str, float] = key(
        {},
        "share of the teacher's size that stays, by the names above, as in {hidden_size: 0.75}; rounded to the nearest "
        "multiple of prune.divisible_by (hidden_size and ffn_hidden_size) and of what tensor parallelism needs",
    )

    @property
    def is_named(self) -> bool:
        """Whether the recipe says anything of it, but for where it is written."""
        return dataclasses.replace(self, checkpoint=None) != StudentConfig()


@section
class PruneConfig:
    """How the plan chooses."""

    layers: LayerChoice = key(
        "scattered", "scattered: those that cost least to leave out; contiguous: the block that costs least"
    )
    depth_metric: DepthMetric = key(
        "block_influence", "what leaving a layer out costs; all but the default by importance.depth_metrics"
    )
    variant: Optional[str] = key(
        None, "which of the scores' aggregations, as l2/mean/pre_activation; null: their first"
    )
    divisible_by: int = key(
        1, "what must divide a pruned hidden_size and ffn_hidden_size; tensor cores like 64", at_least=1
    )
    head_residual: HeadResidual = key(
        "none",
        "what kept heads take up of dropped ones (arXiv 2407.14679, section 2.3): paper adds head - dropped, laco "
        "dropped - head",
    )
    residual_matrices: list[Annotated[str, OneOf(*RESIDUAL_MATRICES)]] = key(
        ["query", "output"],
        "the matrices that do; key and value only where each KV group has one head",
        distinct=True,
    )
    steps: int = key(
        1,
        "steps in which `run` prunes, scoring anew in each (arXiv 2407.14679, table 14: as good as one shot)",
        at_least=1,
    )
    step_tokens: int = key(0, "tokens trained between two steps, as section distill says", at_least=0)
    step_loss: Annotated[str, OneOf("distillation", "next_token")] = key(
        "distillation", "what is trained on between two steps"
    )
    overwrite: bool = key(False, "write over a plan or a student that exists")

    def __post_init__(self) -> None:
        if self.step_tokens and self.steps == 1:
            rule = "trains between steps, but prune.steps=1 has one"
            raise InputError("step_tokens", self.step_tokens, rule, "raise prune.steps, or leave it out")
