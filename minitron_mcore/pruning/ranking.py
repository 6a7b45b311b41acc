"""From the scores of one axis to the indices that stay, and how close the decision was. Ties keep the lower index.
Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy


@dataclass(frozen=True)
class Cut:
    """One cut through an axis, and the two scores that decided it.

    margin = (lowest_kept - highest_dropped) / |lowest_kept|: the relative change of a score that would keep another
    index; None if nothing was dropped. For a contiguous block of layers the two scores are block totals: that of the
    next cheapest block, and that of the block that goes.
    """

    kept: int
    of: int
    margin: float | None = None
    lowest_kept: float | None = None
    highest_dropped: float | None = None
    layer: int | None = None  # the teacher's layer, for axes that are ranked within one
    group: int | None = None  # its KV group, for heads

    def gap(self) -> float:
        """lowest_kept - highest_dropped; infinite where nothing was dropped."""
        return math.inf if self.lowest_kept is None else self.lowest_kept - (self.highest_dropped or 0.0)


def best(
    scores: numpy.ndarray, count: int, layer: int | None = None, group: int | None = None
) -> tuple[list[int], Cut]:
    """The `count` indices of highest score, ascending; of equal scores the lower index."""
    order = numpy.argsort(-scores, kind="stable")
    kept = sorted(order[:count].tolist())
    if count == len(scores):
        return kept, Cut(count, count, layer=layer, group=group)
    return kept, _cut(count, len(scores), scores[order[count - 1]], scores[order[count]], layer, group)


def without_cheapest(blocks: Sequence[float], total: int) -> tuple[list[int], Cut]:
    """Every one of `total` layers outside the block that costs least; of equal blocks the later one goes.

    `blocks` [total - length + 1]: the cost of each block of that length, by its first layer.
    """
    count = len(blocks) - 1
    order = sorted(range(len(blocks)), key=lambda start: (blocks[start], -start))
    gone = range(order[0], order[0] + total - count)
    kept = [layer for layer in range(total) if layer not in gone]
    return kept, _cut(count, total, blocks[order[1]], blocks[order[0]])


def residual_pairs(scores: numpy.ndarray, count: int) -> list[tuple[int, int]]:
    """(kept, dropped) pairs of head residuals when the `count` best of `scores` stay, ascending by kept index.

    Numbering L heads from 1 by descending score, of which K stay, head i in [2K - L + 1, K] absorbs head 2K - i + 1:
    the last to stay takes the first to go, and so on outwards. Needs K >= L / 2. Source: arXiv 2407.14679, section 2.3,
    whose printed lower bound is off by one: it names a head that does not exist.
    """
    order = numpy.argsort(-scores, kind="stable").tolist()
    pairs = [(order[2 * count - place], order[place - 1]) for place in range(count + 1, len(order) + 1)]
    return sorted(pairs)


def narrowest(cuts: Sequence[Cut]) -> Cut:
    """The cut of least margin (the first of equal ones); if nothing was dropped, one with counts alone."""
    real = [cut for cut in cuts if cut.margin is not None]
    return min(real, key=lambda cut: cut.margin or 0.0) if real else Cut(cuts[0].kept, cuts[0].of)


def _cut(
    kept: int, of: int, lowest_kept: float, highest_dropped: float, layer: int | None = None, group: int | None = None
) -> Cut:
    # For positive scores the larger of the two is |lowest_kept|; taking the larger keeps any margin finite.
    scale = max(abs(lowest_kept), abs(highest_dropped))
    margin = float((lowest_kept - highest_dropped) / scale) if scale else 0.0
    return Cut(kept, of, margin, float(lowest_kept), float(highest_dropped), layer, group)
