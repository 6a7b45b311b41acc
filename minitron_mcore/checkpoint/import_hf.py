"""Hugging Face folder -> Megatron checkpoint at any layout; each rank reads the slices it will hold, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.conversion import Unit, units
from minitron_mcore.checkpoint.safetensors_folder import SafetensorsFolder
from minitron_mcore.checkpoint.weight_checks import CheckedWeights, WeightChecks
from minitron_mcore.checkpoint.writer import Source, save_stream, shard_pieces
from minitron_mcore.layout import check_tensor_parallel, stage_parameters
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.runtime.groups import data_group, pipeline_group, tensor_group
from minitron_mcore.runtime.start import Runtime


def import_checkpoint(
    source: Path,
    target: Path,
    architecture: Architecture,
    parallel: ParallelConfig,
    runtime: Runtime,
    *,
    called: str | None = None,
    allow: Sequence[str] = (),
) -> CheckedWeights:
    """Write the weights of the Hugging Face folder `source` as iteration 0 of `target`, in their stored dtype.

    Every rank calls, after `use_layout(parallel)`. A rank reads the parts it stores block by block, on a few threads,
    and holds a block for each. Raises InputError on every rank, naming file and tensor, if tensors are missing,
    unknown, of another shape, cut off, all zero, or hold NaN or Inf (unless `allow`, the recipe's, lets them through),
    and if `target` cannot be written, which messages call `called`; nothing is left behind then.
    """
    check_tensor_parallel(architecture, parallel.tensor)
    here = stage_parameters(architecture, parallel.pipeline, pipeline_group().rank())
    wanted = units(architecture)
    checks = WeightChecks()
    folder = SafetensorsFolder(source, checks.look)
    for note in folder.check(wanted, architecture, allow_extra="extra_tensors" in allow):
        runtime.print(f"import: WARNING: {note}")
    if not architecture.untie_embeddings_and_output_weights:
        (embedding,) = next(unit.names for unit in wanted if unit.parameter.is_embedding)
        runtime.on_main(partial(folder.check_tied_head, embedding))
    works = data_group(with_context=True).rank() == 0  # replicas of a shard have nothing to write
    sources = [
        found
        for unit in wanted
        if works and (unit.parameter, unit.layer) in here
        for found in _sources(folder, unit, architecture, tensor_group().rank(), parallel.tensor)
    ]
    judge = partial(checks.judge, wanted, architecture, folder.path, allow)
    how: Any = {"architecture": architecture, "called": called, "title": "import"}
    return save_stream(target, 0, sources, runtime, judge, **how)


def _sources(folder: SafetensorsFolder, unit: Unit, architecture: Architecture, rank: int, size: int) -> list[Source]:
    """What tensor-parallel `rank` stores of `unit`; nothing of a replicated parameter that another rank stores."""
    pieces = shard_pieces(unit.parameter, architecture, folder.dtype(unit.names[0]), unit.layer, rank, size)
    if unit.parameter.gated:  # gate and up are stored one after the other
        parts = [folder.slice(unit, index, architecture, rank, size) for index in range(2)]
    else:
        parts = [folder.part(unit, architecture, rank, size)]
    return [Source(piece, part) for piece, part in zip(pieces, parts, strict=False)]
