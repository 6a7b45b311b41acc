"""Recipe sections of the runtime."""

from dataclasses import dataclass
from typing import Optional


@dataclass
class ParallelConfig:
    """How the model is laid over the ranks; data parallelism takes what is left of the world size."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: Optional[int] = None  # model chunks a stage, for the interleaved schedule
    context: int = 1  # ranks that a sequence is cut over
    sequence: bool = False  # sequence parallelism; needs tensor > 1

    @property
    def replica_ranks(self) -> int:
        """Ranks of one data-parallel replica."""
        return self.tensor * self.pipeline * self.context
