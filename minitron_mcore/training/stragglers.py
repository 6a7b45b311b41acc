"""Ranks that take longer than others for the same work. Pure.

Compared are ranks of one pipeline stage, by the time for reading data and for their own forward and backward passes
(training/accounting.py): waits for other stages and replicas are no part of it. Tensor- and context-parallel ranks wait
for each other within a layer, so that all ranks of a replica's stage are slow with the slowest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Slowest:
    """The rank whose time is most above the median of its stage's others: `ratio` times it."""

    rank: int
    seconds: float
    ratio: float

    def in_words(self, iteration: int, host: str) -> str:
        """One line of the console."""
        took = f"{1000 * self.seconds:.1f} ms an iteration for its data and passes"
        return f" iteration {iteration} | slow: rank {self.rank} on {host}: {took}, {self.ratio:.2f} times the others |"


def slowest(seconds: Sequence[float], stages: int) -> Slowest | None:
    """Of all ranks' `seconds` an iteration; a pipeline stage has a run of ranks in a row, as Megatron lays them out.
    None where no rank has another to be compared with."""
    size, found = len(seconds) // stages, []
    for first in range(0, len(seconds), size):
        own = list(seconds[first : first + size])
        if size > 1:
            worst = max(range(size), key=own.__getitem__)
            others = median(own[:worst] + own[worst + 1 :])
            found.append(Slowest(first + worst, own[worst], own[worst] / max(others, 1e-9)))
    return max(found, key=lambda each: each.ratio, default=None)
