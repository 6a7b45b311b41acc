"""Scores of one axis -> which indices stay, and how close the decision was. Ties keep the lower index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy


@dataclass(frozen=True)
class Cut:
    """One place at which an axis was cut, and the two scores that decided there.

    margin = (lowest_kept - highest_dropped) / |lowest_kept|: how much a score may move, relatively, before another
    index is kept. None where nothing was dropped. For a contiguous block of layers the two are block totals: of the
    next best block, and of the one that goes.
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


def best(scores: numpy.ndarray, count: int) -> tuple[list[int], Cut]:
    """The `count` indices of highest score, ascending; of equal scores the lower index."""
    order = numpy.argsort(-scores, kind="stable")
    kept = sorted(order[:count].tolist())
    if count == len(scores):
        return kept, Cut(count, count)
    return kept, _cut(count, len(scores), scores[order[count - 1]], scores[order[count]])


def best_in_groups(
    scores: numpy.ndarray, groups: int, count: int, among: Sequence[int] | None = None
) -> tuple[list[int], list[Cut]]:
    """The `count` best of each of `groups` equal, contiguous parts of `scores`, as indices of the whole; their cuts.

    `among`: the parts that are looked at, ascending; by default all.
    """
    kept: list[int] = []
    cuts: list[Cut] = []
    parts = numpy.split(scores, groups)
    for group in range(groups) if among is None else among:
        chosen, cut = best(parts[group], count)
        kept += [group * len(parts[group]) + index for index in chosen]
        cuts.append(replace(cut, group=group))
    return kept, cuts


def without_block(influence: numpy.ndarray, count: int) -> tuple[list[int], Cut]:
    """Every layer but the contiguous block of least total influence; of equal blocks the later one goes."""
    total = len(influence)
    length = total - count
    if length == 0:
        return list(range(total)), Cut(total, total)
    # fsum: a block's total does not depend on the order of its layers, so equal blocks are equal.
    return without_cheapest([math.fsum(influence[start : start + length]) for start in range(count + 1)], total)


def without_cheapest(blocks: Sequence[float], total: int) -> tuple[list[int], Cut]:
    """Every one of `total` layers but the block that costs least; of equal ones the later goes.

    `blocks` [total - length + 1]: what each block of that length costs, by its first layer.
    """
    count = len(blocks) - 1
    order = sorted(range(len(blocks)), key=lambda start: (blocks[start], -start))
    gone = range(order[0], order[0] + total - count)
    kept = [layer for layer in range(total) if layer not in gone]
    return kept, _cut(count, total, blocks[order[1]], blocks[order[0]])


def residual_pairs(scores: numpy.ndarray, count: int) -> list[tuple[int, int]]:
    """(kept, dropped) of head residuals, where the `count` best of `scores` stay: by kept index, ascending.

    By descending score and from 1 on, head i of [2K - L + 1, K] takes up head 2K - i + 1, for L heads of which K stay:
    the last that stays the first that goes, and so on outwards. Needs K >= L / 2. Source: arXiv 2407.14679, section
    2.3, whose printed lower bound is off by one: it asks for a head that is not there.
    """
    order = numpy.argsort(-scores, kind="stable").tolist()
    pairs = [(order[2 * count - place], order[place - 1]) for place in range(count + 1, len(order) + 1)]
    return sorted(pairs)


def narrowest(cuts: Sequence[Cut]) -> Cut:
    """The cut of least margin (the first of equal ones); counts alone where nothing was dropped."""
    real = [cut for cut in cuts if cut.margin is not None]
    return min(real, key=lambda cut: cut.margin or 0.0) if real else Cut(cuts[0].kept, cuts[0].of)


def closest(cuts: Sequence[Cut]) -> Cut:
    """The cut of least gap: where scores that are all known equally well decided most narrowly."""
    return min(cuts, key=Cut.gap)


def _cut(kept: int, of: int, lowest_kept: float, highest_dropped: float) -> Cut:
    # Scores are positive, where the larger of the two is |lowest_kept|; so it stays finite for any scores.
    scale = max(abs(lowest_kept), abs(highest_dropped))
    margin = float((lowest_kept - highest_dropped) / scale) if scale else 0.0
    return Cut(kept, of, margin, float(lowest_kept), float(highest_dropped))
