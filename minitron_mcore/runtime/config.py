"""Recipe sections of the runtime."""

from typing import Optional

from minitron_mcore.errors import InputError
from minitron_mcore.keys import key, section


@section
class ParallelConfig:
    """How the model is laid over the ranks; data parallelism takes what is left of the world size."""

    tensor: int = key(1, "ranks that every matrix is cut over", at_least=1)
    pipeline: int = key(1, "stages that the layers are cut into", at_least=1)
    virtual_pipeline: Optional[int] = key(
        None,
        "model chunks a stage, for the interleaved schedule",
        at_least=2,
        remedy="leave it out for the plain 1F1B schedule",
    )
    context: int = key(1, "ranks that a sequence is cut over", at_least=1)
    sequence: bool = key(False, "sequence parallelism; needs tensor > 1")

    def __post_init__(self) -> None:
        if self.virtual_pipeline is not None and self.pipeline == 1:
            remedy = "raise pipeline, or leave virtual_pipeline out"
            raise InputError("virtual_pipeline", self.virtual_pipeline, "needs pipeline of at least 2", remedy)
        if self.sequence and self.tensor == 1:
            rule = "cuts the sequence over tensor-parallel ranks, but tensor=1"
            raise InputError("sequence", True, rule, "raise tensor, or set sequence=false")

    @property
    def replica_ranks(self) -> int:
        """Ranks of one data-parallel replica."""
        return self.tensor * self.pipeline * self.context
