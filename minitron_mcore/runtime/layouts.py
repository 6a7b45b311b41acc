"""What a layout over ranks can be. Pure."""

from __future__ import annotations

from minitron_mcore.errors import InputError
from minitron_mcore.runtime.config import ParallelConfig


def check_layout(parallel: ParallelConfig, world_size: int, key: str = "parallel") -> None:
    """Raise InputError, with the arithmetic, where `world_size` ranks cannot be laid out as the section `key` says."""
    ranks = parallel.replica_ranks
    if world_size % ranks:
        context = f" x {key}.context={parallel.context}" if parallel.context > 1 else ""
        raise InputError(
            f"{key}.tensor",
            parallel.tensor,
            f"x {key}.pipeline={parallel.pipeline}{context} = {ranks} ranks for one copy of the model, but "
            f"{world_size} {'was' if world_size == 1 else 'were'} started",
            f"start a multiple of {ranks}, or change {key}.* (--dry-run takes cluster.gpus for the ranks)",
        )


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
