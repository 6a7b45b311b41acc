"""What a plan keeps of every parameter, axis by axis, and who holds it: the one definition, in numbers alone.

A parameter is made from one *part* of the teacher's: of its sharded axis (of the first, where it has none) the rows
that a rank of the student holds, of the other axes what the plan keeps.

Head residuals are what kept query heads take up of the dropped ones (arXiv 2407.14679, section 2.3). A head is d rows
of the query part of linear_qkv (weight and bias) and d columns of linear_proj; where each KV group has one head, its
key and its value too.

Rows are copied as fast as the host can: in time, pruning is little else.

The axis names are those of layout.py's table. Legend: d head dimension (kv_channels), q query heads in a KV group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.layout import Parameter, shard_slices
from minitron_mcore.pruning.plan_file import PruningPlan

# NumPy takes rows two to three times as fast as torch does on a host, and knows bfloat16 as bits alone.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
BLOCK_BYTES = 1 << 17  # stays in a processor's cache between the two axes
# One axis: (plan, the teacher's layer) -> kept rows [n] of the teacher's global axis, int64, in the student's order.
Rows = Callable[[PruningPlan, int], numpy.ndarray]


def _gated_ffn(plan: PruningPlan, layer: int) -> numpy.ndarray:
    """[2f]: the gate's rows, then the up projection's."""
    neurons = numpy.array(plan.ffn[layer])
    return numpy.concatenate([neurons, plan.teacher.ffn_hidden_size + neurons])


def _qkv(plan: PruningPlan, layer: int) -> numpy.ndarray:
    """[kept groups * (q + 2) * d]: of each group that stays its kept query heads, then its key and its value."""
    q = plan.teacher.heads_per_group
    group, place = numpy.divmod(numpy.array(plan.heads[layer]), q)
    queries = (group * (q + 2) + place).reshape(plan.student.num_query_groups, -1)
    first = numpy.array(plan.groups[layer])[:, None] * (q + 2)
    return _blocks(numpy.concatenate([queries, first + q, first + q + 1], axis=1), plan)


def _blocks(indices: numpy.ndarray | list[int], plan: PruningPlan) -> numpy.ndarray:
    """Rows of the given blocks of d rows each."""
    d = plan.teacher.kv_channels
    return (numpy.reshape(indices, (-1, 1)) * d + numpy.arange(d)).reshape(-1)


AXES: dict[str, Rows] = {
    "vocab": lambda plan, layer: numpy.arange(plan.teacher.padded_vocab_size),
    "hidden": lambda plan, layer: numpy.array(plan.hidden),
    "ffn": lambda plan, layer: numpy.array(plan.ffn[layer]),
    "gated_ffn": _gated_ffn,
    "heads": lambda plan, layer: _blocks(plan.heads[layer], plan),  # [heads * d]: the columns of every kept query head
    "head": lambda plan, layer: numpy.arange(plan.teacher.kv_channels),  # the channels of a head are never pruned
    "qkv": _qkv,
}


def kept_rows(parameter: Parameter, plan: PruningPlan, layer: int | None) -> list[numpy.ndarray]:
    """For each axis of the global parameter (of the teacher's `layer`), the rows that stay, in the student's order."""
    return [AXES[axis](plan, -1 if layer is None else layer) for axis in parameter.axes]


def _partner_rows(axis: str, plan: PruningPlan, layer: int) -> numpy.ndarray | None:
    """[rows of the teacher's `axis`]: the dropped row that each row takes up, -1 for none; None where none does."""
    if plan.residual is None or axis not in ("qkv", "heads") or not plan.residual.pairs[layer]:
        return None
    q, d = plan.teacher.heads_per_group, plan.teacher.kv_channels
    blocks = plan.teacher.num_attention_heads + (2 * plan.teacher.num_query_groups if axis == "qkv" else 0)
    partners = numpy.full((blocks, d), -1)
    for kept, dropped in plan.residual.pairs[layer]:
        for matrix in plan.residual.matrices:
            if (matrix == "output") == (axis == "heads"):
                block, partner = (_block_of(matrix, head, q) for head in (kept, dropped))
                partners[block] = partner * d + numpy.arange(d)
    return partners.reshape(-1)


def _block_of(matrix: str, head: int, q: int) -> int:
    """Which block of d rows of its axis a head has in `matrix`: a group is its query heads, then key, then value."""
    if matrix == "output":
        return head
    group, place = divmod(head, q)
    return group * (q + 2) + {"query": place, "key": q, "value": q + 1}[matrix]


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
        """The part [n along `axis`] of what lies in the `needed` rows: kept + (kept - partner) in the rows that have a
        partner, by "laco" kept + (partner - kept).

        In float32 or better, row by row and rounded once, so that it gives the same bits wherever the rows lie.
        """
        if self.partners is None or plan.residual is None:
            return needed
        kept, partner = needed.split([len(self.rows), len(self._there)], dim=self.axis)
        where = torch.from_numpy(numpy.nonzero(self.partners >= 0)[0]).to(kept.device)
        wide = torch.promote_types(kept.dtype, torch.float32)
        head, dropped = kept.index_select(self.axis, where).to(wide), partner.to(wide)
        difference = head - dropped if plan.residual.rule == "paper" else dropped - head
        return kept.index_copy(self.axis, where, (head + difference).to(kept.dtype))


def part_of(parameter: Parameter, plan: PruningPlan, layer: int | None, rank: int = 0, size: int = 1) -> Part:
    """What tensor-parallel `rank` of `size` needs for its part of a student's parameter, of the teacher's `layer`."""
    axis = parameter.shard_axis or 0
    rows = kept_rows(parameter, plan, layer)[axis]
    partners = None if layer is None else _partner_rows(parameter.axes[axis], plan, layer)
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


def take(tensor: torch.Tensor, axis: int, rows: numpy.ndarray) -> torch.Tensor:
    """`rows` of `axis`, copied; the tensor itself where they are all of it in order."""
    return select(tensor, [rows if other == axis else None for other in range(tensor.ndim)])


def select(tensor: torch.Tensor, rows: Sequence[numpy.ndarray | None]) -> torch.Tensor:
    """Of each axis its `rows`, None for all of it; copied, but the tensor itself where all are all of it in order."""
    wanted = [
        None if kept is None or numpy.array_equal(kept, numpy.arange(size)) else kept
        for kept, size in zip(rows, tensor.shape, strict=True)
    ]
    if tensor.device.type == "cpu" and len(wanted) == 2 and wanted[1] is not None:
        return _select_columns(tensor, wanted[0], wanted[1])
    for axis, kept in enumerate(wanted):
        if kept is not None and tensor.device.type == "cpu":
            tensor = torch.from_numpy(_bits(tensor).take(kept, axis=axis)).view(tensor.dtype)
        elif kept is not None:
            tensor = tensor.index_select(axis, torch.from_numpy(kept).to(tensor.device))
    return tensor


def _bits(tensor: torch.Tensor) -> numpy.ndarray:
    return tensor.detach().view(BITS[tensor.element_size()]).numpy()


def _select_columns(tensor: torch.Tensor, rows: numpy.ndarray | None, columns: numpy.ndarray) -> torch.Tensor:
    """A block of rows after the other, so that no copy of all of them is made on the way."""
    source = _bits(tensor)
    result = torch.empty((len(source) if rows is None else len(rows), len(columns)), dtype=tensor.dtype)
    target = _bits(result)
    count = max(1, BLOCK_BYTES // (source.itemsize * source.shape[1]))
    for start in range(0, len(target), count):
        place = slice(start, start + count)
        # With another mode than clip, NumPy fills `out` by way of a buffer; the indices are known to be good.
        numpy.take(source[place if rows is None else rows[place]], columns, axis=1, out=target[place], mode="clip")
    return result
