"""Recipe section of a layout over ranks, and what a layout can be."""

import re
from typing import Annotated, Optional

from minitron_mcore.errors import InputError
from minitron_mcore.keys import OneOf, PathName, key, section

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


_TIME = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")


def seconds_of(time: str, key_name: str = "time") -> int:
    """Of a time as SLURM writes it, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS. Raises InputError."""
    match = _TIME.fullmatch(time)
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0, 0)
    if total := ((24 * days + hours) * 60 + minutes) * 60 + seconds:
        return total
    raise InputError(key_name, time, "must be HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS, as 04:00:00")


@section
class StageConfig:
    """What a job of `submit` asks SLURM for."""

    nodes: Optional[int] = key(
        None,
        "null: of a training cluster.gpus, of all else the fewest that hold one copy of the model",
        at_least=1,
    )
    gpus_per_node: Optional[int] = key(
        None, "tasks of a node, one for each GPU; null: cluster.gpus_per_node", at_least=1
    )
    time: Optional[str] = key(None, "null: what `estimate` says and some more, at most cluster.time")
    tasks: Optional[int] = key(
        None,
        "jobs of the array that share the candidates of `search` or the settings of `ablate`; null: one for each "
        "candidate (or search.side_by_side), eight for settings",
        at_least=1,
    )

    def __post_init__(self) -> None:
        if self.time is not None:
            seconds_of(self.time)


@section
class SubmitConfig:
    """What `submit` hands to SLURM."""

    verb: Annotated[str, OneOf("run", "search", "ablate", "align", "cache", "distill", "train")] = key(
        "run", "what becomes jobs: the steps of `run`, the array of `search` or `ablate`, one job of the others"
    )
    force: bool = key(
        False, "cancel the jobs of this folder that are still queued or running, and submit anew; asks no queue"
    )


@section
class ClusterConfig:
    """Section `cluster`: the machine that a dry run, `estimate`, `search` and `submit` plan for, where the ranks are
    not those that were started. What is null follows from `device`."""

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
    template: Optional[PathName] = key(None, "of a job of `submit`, see docs/cluster.md; null: launch/pipeline.sbatch")
    time: str = key(
        "04:00:00", "that a job of `submit` asks for at most; one that takes longer is requeued and goes on"
    )
    stages: dict[str, StageConfig] = key(
        {},
        "size and time of jobs of `submit`, by the name of a step or by its verb, as cluster.stages.distill.nodes=32",
    )

    def __post_init__(self) -> None:
        seconds_of(self.time)


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
