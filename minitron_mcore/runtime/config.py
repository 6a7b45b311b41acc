"""Recipe section of a layout over ranks, and what a layout can be."""

from typing import Optional

from minitron_mcore.errors import InputError
from minitron_mcore.keys import key, section

INSTANCES = "num_distributed_optimizer_instances"  # Megatron's


@section
class ParallelConfig:
    """How the model is laid over the ranks; data parallelism takes what is left of the world size."""

    tensor: int = key(1, "ranks that every matrix is cut over", at_least=1)
    pipeline: int = key(1, "stages that the layers are cut into", at_least=1)
    virtual_pipeline: Optional[int] = key(
        None, "model chunks a stage, for the interleaved schedule", at_least=2, remedy="leave it out for plain 1F1B"
    )
    context: int = key(1, "ranks that a sequence is cut over", at_least=1)
    sequence: bool = key(False, "sequence parallelism; needs tensor > 1")
    # The same layout for a model, hence not compared.
    num_distributed_optimizer_instances: int = key(
        1, "copies of the optimizer's state, each cut over as many data-parallel ranks", at_least=1, compare=False
    )

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


@section
class ClusterConfig:
    """Section `cluster`: the machine that a dry run, `estimate` and `search` plan for, where the ranks are not those
    that were started. What is null follows from `device`."""

    gpus: Optional[int] = key(None, "ranks, one for each GPU; null: those that were started", at_least=1)
    gpus_per_node: int = key(8, "ranks of a node", at_least=1)
    device: Optional[str] = key(None, "name of a GPU, as H100 (docs/estimate.md has the list); null: the keys below")
    gpu_memory: Optional[int] = key(None, "bytes of a GPU, as 80Gi", at_least=1)
    host_memory: Optional[int] = key(None, "bytes of a node's host memory, as 2000Gi; null: not known", at_least=1)
    peak_tflops: Optional[float] = key(None, "dense bf16 peak of a GPU, in TFLOP/s", above=0)
    peak_tflops_fp8: Optional[float] = key(None, "dense fp8 peak, in TFLOP/s", above=0)
    peak_tflops_fp32: Optional[float] = key(None, "fp32 peak, in TFLOP/s", above=0)
    memory_bandwidth: Optional[float] = key(None, "of a GPU's memory, in GB/s", above=0)
    intra_node_bandwidth: Optional[float] = key(None, "GB/s that a GPU sends to others of its node", above=0)
    inter_node_bandwidth: Optional[float] = key(None, "GB/s that a GPU sends to other nodes", above=0)
    efficiency: Optional[float] = key(None, "share of the peak that matrix products reach", above=0, at_most=1)
    overlap: Optional[float] = key(
        None,
        "share of data-parallel communication that is hidden; null: worked out from `overlap_*`",
        at_least=0,
        at_most=1,
    )
    price: Optional[float] = key(None, "of a GPU for an hour, in any currency; null: no cost", at_least=0)
    power: Optional[float] = key(None, "watts of a GPU with its share of node and cooling", above=0)
    grace_seconds: Optional[float] = key(
        None, "from the signal that warns a job to its end; null: MINITRON_GRACE_SECONDS, where it is set", above=0
    )


@section
class WatchConfig:
    """Section `watch`: when ranks that go no further end the job (runtime/watchdog.py)."""

    hang_minutes: float = key(
        10.0, "in an iteration no rank goes any further for so long: the job ends; 0: nothing is watched", at_least=0
    )
    quiet_minutes: float = key(
        60.0, "the same in what tells little on its way: starts, first iterations, saves, other verbs", at_least=0
    )

    def __post_init__(self) -> None:
        if self.hang_minutes and self.quiet_minutes < self.hang_minutes:
            rule = f"must be hang_minutes={self.hang_minutes:g} or more, as it is for what tells less on its way"
            raise InputError("quiet_minutes", f"{self.quiet_minutes:g}", rule, "raise it, or lower hang_minutes")


def check_layout(parallel: ParallelConfig, world_size: int, key: str = "parallel") -> None:
    """Raise InputError, with the arithmetic, where `world_size` ranks cannot be laid out as the section `key` says."""
    ranks = parallel.replica_ranks
    if world_size % ranks:
        context = f" x {key}.context={parallel.context}" if parallel.context > 1 else ""
        started = f"{world_size} {'was' if world_size == 1 else 'were'} started"
        rule = f"x {key}.pipeline={parallel.pipeline}{context} = {ranks} ranks for one copy of the model, but {started}"
        remedy = f"start a multiple of {ranks}, or change {key}.* (--dry-run takes cluster.gpus for the ranks)"
        raise InputError(f"{key}.tensor", parallel.tensor, rule, remedy)
    instances, data = parallel.num_distributed_optimizer_instances, world_size // ranks
    if data * parallel.context % instances:
        of = f"ranks of a shard, {data} data-parallel x {key}.context={parallel.context}"
        of = f"{of} = {data * parallel.context}" if parallel.context > 1 else f"data-parallel ranks, {data}"
        remedy = "set a number that does, or start other ranks"
        raise InputError(f"{key}.{INSTANCES}", instances, f"does not divide the number of {of}", remedy)


def check_packing(layouts: dict[str, ParallelConfig], key: str = "chat.packing") -> None:
    """Raise InputError where packed rows, which `key` asks for, cannot be run in one of `layouts`: by their names the
    sections that lay a model over the ranks (`parallel`, `teacher.parallel`)."""
    for name, parallel in layouts.items():
        if parallel.context > 1:
            rule = f"does not go with {name}.context={parallel.context}, since segments are not cut over ranks"
            raise InputError(key, True, rule, f"set {key}=false, or {name}.context=1")


def check_sequence(
    length: int, parallel: ParallelConfig, key: str = "data.sequence_length", layout: str = "parallel"
) -> None:
    """Raise InputError where sequences of `length` tokens, which `key` asks for, cannot be cut for `parallel`, the
    recipe's section `layout`."""
    tensor = parallel.tensor if parallel.sequence else 1
    parts = (2 * parallel.context if parallel.context > 1 else 1) * tensor
    if length % parts == 0:
        return
    factors = ["2", f"{layout}.context={parallel.context}"] if parallel.context > 1 else []
    factors += [f"{layout}.tensor={parallel.tensor}"] if tensor > 1 else []
    product = " x ".join(factors) + (f" = {parts}" if len(factors) > 1 else "")
    why = f", as {layout}.sequence=true needs" if tensor > 1 else ""
    raise InputError(key, length, f"is not a multiple of {product} ({length} / {parts} = {length / parts:g}){why}")
