"""Magnitude: every structure's score is the L2 norm of its weights. No data and no forward pass; a baseline.

    hidden   its column of qkv, fc1, embedding and output head, its row of the two projections back, in all layers
    ffn      its rows of fc1 (gate and up), its column of fc2
    heads    its d rows of the query, its d columns of the output projection
    groups   the rows of its query heads, key and value, the columns of its query heads in the output projection
    layers   all four matrices

Only matrices count: a norm's weight is stored as γ or as γ − 1, depending on the family, and a bias cannot be compared
across channels. Rows that pad the vocabulary do not count.

Squares are summed in float64 over whole global matrices, so that the layouts of saving and of scoring change only the
order of a few additions.

Legend: h hidden, f ffn, g KV groups, q query heads in a group, d head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.reader import TensorReader
from minitron_mcore.errors import InputError
from minitron_mcore.importance.scores import OF_WEIGHTS, Scores, axis_shapes
from minitron_mcore.layout import Parameter, parameter_table
from minitron_mcore.runtime.agree import all_or_none

# (parameter, global layer or None) -> the whole global tensor of one layer, of any floating type
Read = Callable[[Parameter, int | None], torch.Tensor]

CHUNK = 2**22  # values that are in memory as float64 at a time


def magnitude_scores(
    folder: Path, iteration: int, architecture: Architecture, settings: dict[str, Any] | None = None
) -> Scores:
    """Scores of the checkpoint in `folder`; the same on every rank, at every layout it was saved at.

    Every rank calls; each reads its share of the parameters, one at a time. Raises InputError, on every rank, if the
    checkpoint is damaged, is of another architecture, or holds NaN or Inf.
    """
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def read_share() -> dict[str, torch.Tensor]:
        reader = TensorReader(folder, iteration, architecture)
        return squares(architecture, lambda p, layer: reader.read_part(p, architecture, layer, 0, 1), rank, size)

    sums = all_or_none(read_share)
    for axis, values in sums.items():
        moved = values.to(torch.cuda.current_device())
        torch.distributed.all_reduce(moved)
        sums[axis] = moved.cpu()
    return from_squares(architecture, sums, settings)


def squares(architecture: Architecture, read: Read, part: int = 0, parts: int = 1) -> dict[str, torch.Tensor]:
    """Sums of squares by axis, of every `parts`-th matrix from `part` on: float64, shaped as in `Scores`."""
    a = architecture
    sums = {axis: torch.zeros(shape, dtype=torch.float64) for axis, shape in axis_shapes(a).items()}
    matrices = [
        (parameter, layer)
        for parameter in parameter_table(a)
        if len(parameter.axes) == 2
        for layer in (range(a.num_layers) if parameter.per_layer else [None])
    ]
    for parameter, layer in matrices[part::parts]:
        across = _by_row_and_column(read(parameter, layer), parameter, a)
        if not all(values.isfinite().all() for values in across):
            where = "" if layer is None else f" of layer {layer} (the first is 0)"
            rule = "holds NaN or Inf, so that its magnitude is unknown"
            raise InputError("", f"{parameter.key}{where}", rule, "use a checkpoint with finite weights")
        for axis, values in zip(parameter.axes, across, strict=True):
            _add(sums, axis, values, layer, a)
        if layer is not None:
            sums["layers"][layer] += across[0].sum()
    return sums


def from_squares(
    architecture: Architecture, sums: dict[str, torch.Tensor], settings: dict[str, Any] | None = None
) -> Scores:
    """Scores from the sums of squares by axis."""
    arrays: dict[str, Any] = {axis: values.sqrt().numpy() for axis, values in sums.items()}
    said = {"importance": {"method": "magnitude"}, "tolerance": OF_WEIGHTS, **(settings or {})}
    return Scores(architecture=architecture, settings=said, **arrays)


def _by_row_and_column(
    matrix: torch.Tensor, parameter: Parameter, architecture: Architecture
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of squares of every row and of every column, float64."""
    if parameter.axes[0] == "vocab":
        matrix = matrix[: architecture.vocab_size]
    rows, columns = [], torch.zeros(matrix.shape[1], dtype=torch.float64)
    for piece in matrix.split(max(1, CHUNK // matrix.shape[1])):
        squared = piece.double().square()
        rows.append(squared.sum(1))
        columns += squared.sum(0)
    return torch.cat(rows), columns


def _add(
    sums: dict[str, torch.Tensor], axis: str, values: torch.Tensor, layer: int | None, architecture: Architecture
) -> None:
    """Add the squares along one axis of a matrix, named as in layout.py, to the structures they belong to."""
    a = architecture
    q, d = a.heads_per_group, a.kv_channels
    if axis == "hidden":
        sums["hidden"] += values
    elif axis in ("ffn", "gated_ffn"):
        sums["ffn"][layer] += values.view(-1, a.ffn_hidden_size).sum(0)
    elif axis == "heads":
        heads = values.view(-1, d).sum(1)
        sums["heads"][layer] += heads
        sums["groups"][layer] += heads.view(-1, q).sum(1)
    elif axis == "qkv":
        blocks = values.view(-1, q + 2, d).sum(2)
        sums["heads"][layer] += blocks[:, :q].reshape(-1)
        sums["groups"][layer] += blocks.sum(1)
