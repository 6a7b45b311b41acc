"""Head residuals: what kept query heads take up of the dropped ones (arXiv 2407.14679, section 2.3).

A head is d rows of the query part of linear_qkv (weight and bias) and d columns of linear_proj; where each KV group has
one head, its key and its value too. Legend: d head dimension (kv_channels), q query heads in a KV group.
"""

from __future__ import annotations

import numpy
import torch

from minitron_mcore.pruning.plan_file import PruningPlan


def partner_rows(axis: str, plan: PruningPlan, layer: int) -> numpy.ndarray | None:
    """[rows of the teacher's `axis`]: the dropped row that each row takes up, -1 for none; None where none does.

    `axis` is a name of layout.py's table.
    """
    if plan.residual is None or axis not in ("qkv", "heads") or not plan.residual.pairs[layer]:
        return None
    q, d = plan.teacher.heads_per_group, plan.teacher.kv_channels
    blocks = plan.teacher.num_attention_heads + (2 * plan.teacher.num_query_groups if axis == "qkv" else 0)
    partners = numpy.full((blocks, d), -1)
    for kept, dropped in plan.residual.pairs[layer]:
        for matrix in plan.residual.matrices:
            if (matrix == "output") == (axis == "heads"):
                block, partner = (_block(matrix, head, q) for head in (kept, dropped))
                partners[block] = partner * d + numpy.arange(d)
    return partners.reshape(-1)


def _block(matrix: str, head: int, q: int) -> int:
    """Which block of d rows of its axis a head has in `matrix`: a group is its query heads, then key, then value."""
    if matrix == "output":
        return head
    group, place = divmod(head, q)
    return group * (q + 2) + {"query": place, "key": q, "value": q + 1}[matrix]


def add_residual(
    kept: torch.Tensor, partner: torch.Tensor, axis: int, places: numpy.ndarray, rule: str
) -> torch.Tensor:
    """`kept` with kept + (kept - partner) in its rows `places` of `axis`, or by "laco" kept + (partner - kept).

    In float32 or better, row by row and rounded once, so that it gives the same bits wherever the rows lie.
    """
    where = torch.from_numpy(places).to(kept.device)
    wide = torch.promote_types(kept.dtype, torch.float32)
    head, dropped = kept.index_select(axis, where).to(wide), partner.to(wide)
    difference = head - dropped if rule == "paper" else dropped - head
    return kept.index_copy(axis, where, (head + difference).to(kept.dtype))
