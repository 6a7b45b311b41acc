"""What a plan keeps of every parameter, axis by axis, and who holds it: the one definition, in numbers alone.

A parameter is made from one *part* of the teacher's: of its sharded axis (of the first, where it has none) the rows
that a rank of the student holds, of the other axes what the plan keeps.

The axis names are those of layout.py's table. Legend: d head dimension (kv_channels), q query heads in a KV group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy
import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.layout import Parameter, shard_slices
from minitron_mcore.pruning.plan_file import PruningPlan
from minitron_mcore.pruning.residual import add_residual, partner_rows
from minitron_mcore.pruning.select import select

# One axis: (plan, the teacher's layer) -> kept rows [n] of the teacher's global axis, int64, in the student's order.
Rows = Callable[[PruningPlan, int], numpy.ndarray]


def _vocab(plan: PruningPlan, layer: int) -> numpy.ndarray:
    return numpy.arange(plan.teacher.padded_vocab_size)


def _hidden(plan: PruningPlan, layer: int) -> numpy.ndarray:
    return numpy.array(plan.hidden)


def _ffn(plan: PruningPlan, layer: int) -> numpy.ndarray:
    return numpy.array(plan.ffn[layer])


def _gated_ffn(plan: PruningPlan, layer: int) -> numpy.ndarray:
    """[2f]: the gate's rows, then the up projection's."""
    neurons = _ffn(plan, layer)
    return numpy.concatenate([neurons, plan.teacher.ffn_hidden_size + neurons])


def _heads(plan: PruningPlan, layer: int) -> numpy.ndarray:
    """[heads * d]: the d columns of every kept query head."""
    return _blocks(numpy.array(plan.heads[layer]), plan.teacher.kv_channels)


def _qkv(plan: PruningPlan, layer: int) -> numpy.ndarray:
    """[kept groups * (q + 2) * d]: of each group that stays its kept query heads, then its key and its value."""
    q = plan.teacher.heads_per_group
    group, place = numpy.divmod(numpy.array(plan.heads[layer]), q)
    queries = (group * (q + 2) + place).reshape(plan.student.num_query_groups, -1)
    first = numpy.array(plan.groups[layer])[:, None] * (q + 2)
    blocks = numpy.concatenate([queries, first + q, first + q + 1], axis=1)
    return _blocks(blocks.reshape(-1), plan.teacher.kv_channels)


def _head(plan: PruningPlan, layer: int) -> numpy.ndarray:
    """[d]: the channels of a head are never pruned."""
    return numpy.arange(plan.teacher.kv_channels)


def _blocks(indices: numpy.ndarray, size: int) -> numpy.ndarray:
    """Rows of the given blocks of `size` rows each."""
    return (indices[:, None] * size + numpy.arange(size)).reshape(-1)


AXES: dict[str, Rows] = {
    "vocab": _vocab,
    "hidden": _hidden,
    "ffn": _ffn,
    "gated_ffn": _gated_ffn,
    "heads": _heads,
    "head": _head,
    "qkv": _qkv,
}


def kept_rows(parameter: Parameter, plan: PruningPlan, layer: int | None) -> list[numpy.ndarray]:
    """For each axis of the global parameter (of the teacher's `layer`), the rows that stay, in the student's order."""
    return [AXES[axis](plan, -1 if layer is None else layer) for axis in parameter.axes]


@dataclass(frozen=True)
class Part:
    """The teacher's rows that one rank's part of a student's parameter is made of, along `axis`.

    `rows` [n]: in the student's order. `partners` [n]: for each the row of a dropped head that it takes up, or -1;
    None where there are no head residuals.
    """

    axis: int
    rows: numpy.ndarray
    partners: numpy.ndarray | None = None

    @property
    def needed(self) -> numpy.ndarray:
        """All rows that must be at hand: `rows`, then the partners there are."""
        return self.rows if self.partners is None else numpy.concatenate([self.rows, self._there])

    @property
    def _there(self) -> numpy.ndarray:
        assert self.partners is not None
        return self.partners[self.partners >= 0]

    def made_from(self, needed: torch.Tensor, plan: PruningPlan) -> torch.Tensor:
        """The part [n along `axis`] of what lies in the `needed` rows."""
        if self.partners is None or plan.residual is None:
            return needed
        kept, partner = needed.split([len(self.rows), len(self._there)], dim=self.axis)
        (places,) = numpy.nonzero(self.partners >= 0)
        return add_residual(kept, partner, self.axis, places, plan.residual.rule)


def part_of(parameter: Parameter, plan: PruningPlan, layer: int | None, rank: int = 0, size: int = 1) -> Part:
    """What tensor-parallel `rank` of `size` needs for its part of a student's parameter, of the teacher's `layer`."""
    axis = parameter.shard_axis or 0
    rows = kept_rows(parameter, plan, layer)[axis]
    partners = None
    if layer is not None and plan.residual is not None:
        partners = partner_rows(parameter.axes[axis], plan, layer)
    if parameter.shard_axis is not None:
        mine = shard_rows(parameter, plan.student, rank, size)
        rows, partners = rows[mine], None if partners is None else partners[rows[mine]]
        if partners is not None and (partners < 0).all():
            partners = None
    return Part(axis, rows, partners)


def take_kept(
    tensor: torch.Tensor,
    parameter: Parameter,
    plan: PruningPlan,
    layer: int | None,
    axis: int,
    rows: numpy.ndarray | None = None,
) -> torch.Tensor:
    """`rows` of `axis` (by default all), and of every other axis what the plan keeps."""
    wanted: list[numpy.ndarray | None] = [*kept_rows(parameter, plan, layer)]
    wanted[axis] = rows
    return select(tensor, wanted)


def shard_rows(parameter: Parameter, architecture: Architecture, rank: int, size: int) -> numpy.ndarray:
    """Global rows of the sharded axis that tensor-parallel `rank` of `size` holds, in its local order."""
    slices = shard_slices(parameter, architecture, rank, size)
    return numpy.concatenate([numpy.arange(part.start, part.stop) for part in slices])
