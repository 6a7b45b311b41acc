"""Recipe sections of pruning: the student's shape, and how layers are chosen."""

from dataclasses import dataclass
from typing import Optional


@dataclass
class StudentConfig:
    """The student. Megatron's field names; what is left out stays the teacher's."""

    checkpoint: Optional[str] = None  # folder the pruned checkpoint is written to
    num_layers: Optional[int] = None
    hidden_size: Optional[int] = None
    ffn_hidden_size: Optional[int] = None
    num_attention_heads: Optional[int] = None


@dataclass
class PruneConfig:
    """How the plan chooses."""

    layers: str = "scattered"  # scattered (least block influence) or contiguous (the block of least total influence)
    overwrite: bool = False
