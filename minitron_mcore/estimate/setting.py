"""What the memory of a step depends on. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from minitron_mcore.architecture import BYTES, Architecture
from minitron_mcore.distillation.config import HiddenStatesConfig
from minitron_mcore.model.recompute import KEEP_ALL, Recompute
from minitron_mcore.runtime.config import ParallelConfig


@dataclass(frozen=True)
class Setting:
    """Everything that the memory of a step depends on."""

    student: Architecture
    parallel: ParallelConfig
    precision: str
    data_parallel: int
    sequence_length: int
    global_batch_size: int
    micro_batch_size: int
    loss_chunk_tokens: int | None  # None: config.default_chunk_tokens
    recompute: Recompute = KEEP_ALL  # of the student's pass
    on_cpu: bool = False
    section: str = "train"  # of the recipe, for the names of keys
    micro_batch_key: str = ""  # its full key, perhaps of a phase; empty: the section's
    local_ranks: int = 1  # ranks of a node, which share its host memory
    host_free: int | None = None  # bytes of a node's host memory; None: not known
    teacher: Architecture | None = None
    teacher_parallel: ParallelConfig | None = None  # None: the student's
    teacher_precision: str | None = None  # None: the student's
    teacher_placement: str = "resident"
    teacher_window: int = 0
    teacher_trained: bool = False  # corrected while it teaches, with gradients and an optimizer of its own
    teacher_chunk_tokens: int | None = None  # `loss_chunk_tokens` of the corrected teacher's own pass
    teacher_recompute: Recompute = KEEP_ALL
    hidden_states: HiddenStatesConfig | None = None  # losses between inner states; None: there are none

    @property
    def microbatches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel)

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch on a rank."""
        return self.micro_batch_size * self.sequence_length // self.parallel.context

    @property
    def ahead(self) -> int:
        """Microbatches whose teacher states are held at a time."""
        return min(self.teacher_window or self.microbatches, self.microbatches)

    @property
    def optimizer_shards(self) -> int:
        return self.data_parallel * self.parallel.context

    @property
    def world_size(self) -> int:
        return self.data_parallel * self.parallel.replica_ranks

    @property
    def teacher_layout(self) -> ParallelConfig:
        return self.teacher_parallel or self.parallel

    @property
    def teacher_element(self) -> int:
        """Bytes of an element of the teacher's weights and states; fp8 keeps them in bf16."""
        return BYTES.get(self.teacher_precision or self.precision, 2)
