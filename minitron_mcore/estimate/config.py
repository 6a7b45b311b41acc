"""Recipe section `cluster`: the ranks to plan for, where they are not those that were started."""

from typing import Optional

from minitron_mcore.keys import key, section


@section
class ClusterConfig:
    """The machine that a dry run plans for."""

    gpus: Optional[int] = key(None, "ranks, one for each GPU; null: those that were started", at_least=1)
    gpus_per_node: int = key(8, "ranks of a node", at_least=1)
    gpu_memory: Optional[int] = key(None, "bytes of a GPU, as 80Gi; null: not known", at_least=1)
    host_memory: Optional[int] = key(None, "bytes of a node's host memory, as 2000Gi; null: not known", at_least=1)
