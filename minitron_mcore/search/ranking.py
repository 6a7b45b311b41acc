"""The ranking of a search: who is best, whether the untrained loss would have said so, and what each loss costs. Pure.

Reads results as search/halving.py describes them. Source: arXiv 2407.14679, section 2.3.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minitron_mcore.search.candidates import TIMED, Candidate, in_words
from minitron_mcore.search.halving import Result, best_first, or_infinite, standing, survivors
from minitron_mcore.tables import counted
from minitron_mcore.tables import table as tabulate


@dataclass(frozen=True)
class Ranked:
    """A candidate that was tried. rank: among all, 1 is best, and equals share one; zero_shot_rank: by the loss before
    training. on_front: no other is at once better and cheaper."""

    candidate: Candidate
    result: Result
    rank: int
    zero_shot_rank: int
    on_front: bool

    @property
    def row(self) -> dict[str, Any]:
        """What candidates.csv says of it; candidates.json has the curves besides."""
        found = {
            "rank": self.rank,
            "zero_shot_rank": self.zero_shot_rank,
            "zero_shot": self.result["zero_shot"],
            "loss": self.result["loss"],
            "tokens": self.result["tokens"],
            "on_front": self.on_front,
        }
        return self.candidate.row | found

    @property
    def curves(self) -> dict[str, Any]:
        """What candidates.json says besides."""
        return {name: self.result.get(name) for name in ("curve", "validation", "diverged")}


@dataclass(frozen=True)
class Ranking:
    """rows: the best first. cost: the figure that losses are set against. correlation: Spearman's, between the ranks
    before and after training; None where fewer than three were tried, or all are alike."""

    rows: tuple[Ranked, ...]
    cost: str
    correlation: float | None


def ranked(candidates: Sequence[Candidate], results: Sequence[Result], budgets: Sequence[str] = ()) -> Ranking:
    """The candidates that have a result, the best first: those that trained longest by their loss, then those that
    halving stopped, the latest rung first; what diverged is last. budgets: the figures that have one.
    """
    by_name = {each.name: each for each in candidates}
    order = [result for result in best_first(results) if result["name"] in by_name]
    cost = next((name for name in budgets if name in TIMED), "total_parameters")
    after, before = [standing(result) for result in order], [or_infinite(result["zero_shot"]) for result in order]
    # Of those that trained to the end alone: a loss after fewer tokens is no worse for its shape.
    most = max((result["tokens"] for result in order), default=0)
    points = {
        result["name"]: (_worse_when_larger(by_name[result["name"]], cost), result["loss"])
        for result in order
        if result["tokens"] == most and result["loss"] is not None
    }
    front = pareto_front(points)
    rows = [
        Ranked(
            by_name[result["name"]], result, 1 + sum(other < mine for other in after), place, result["name"] in front
        )
        for result, mine, place in zip(order, after, (1 + sum(o < b for o in before) for b in before), strict=True)
    ]
    return Ranking(tuple(rows), cost, spearman(before, after))


def spearman(first: Sequence[Any], second: Sequence[Any]) -> float | None:
    """Spearman's correlation of two orders of the same things: that of their ranks, equals sharing the mean of theirs.
    None for fewer than three things, or where all of one order are equal."""
    if len(first) < 3:
        return None
    try:
        return statistics.correlation(mean_ranks(first), mean_ranks(second))
    except statistics.StatisticsError:
        return None


def mean_ranks(values: Sequence[Any]) -> list[float]:
    """Each value's rank from 1 on; equals share the mean of their ranks."""
    return [sum(each < value for each in values) + (1 + sum(each == value for each in values)) / 2 for value in values]


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the points (cost, loss) that no other is at least as good as in both and better in one; the cheapest
    first."""

    def beaten(mine: tuple[float, float]) -> bool:
        return any(all(o <= m for o, m in zip(other, mine, strict=True)) and other != mine for other in points.values())

    return sorted((name for name, point in points.items() if not beaten(point)), key=lambda name: points[name])


@dataclass(frozen=True)
class Halved:
    """What halving would have done. kept: the candidates after each rung; winner: the best at the end of those that it
    kept; tokens: of all candidates' trainings together, full_tokens: without halving."""

    kept: tuple[tuple[str, ...], ...]
    winner: str
    best: str
    tokens: int
    full_tokens: int

    @property
    def keeps_the_best(self) -> bool:
        return self.winner == self.best


def halved(results: Sequence[Result], rungs: Sequence[int], keep: float) -> Halved:
    """What successive halving at `rungs` (tokens) would have done to candidates that all trained to the end.

    Compares held-out losses where all have one after a rung's tokens, else the training's own validations. Raises
    ValueError where a rung has neither, or the candidates trained for different numbers of tokens.
    """
    ends = {result["tokens"] for result in results}
    if len(ends) != 1 or None in (result["loss"] for result in results):
        raise ValueError("halving can be tried on candidates that all trained to the same end alone")
    (end,) = ends
    alive, kept, tokens, before = list(results), [], 0, 0
    for rung in sorted(rungs):
        losses = _losses_at(alive, rung)
        tokens += (rung - before) * len(alive)
        before = rung
        names = survivors(losses, keep)
        alive = [result for result in alive if result["name"] in names]
        kept.append(tuple(names))
    tokens += (end - before) * len(alive)
    return Halved(tuple(kept), best_first(alive)[0]["name"], best_first(results)[0]["name"], tokens, end * len(results))


def _losses_at(results: Sequence[Result], tokens: int) -> dict[str, float]:
    for curve in ("curve", "validation"):
        found = {
            each["name"]: or_infinite(loss) for each in results for at, loss in each.get(curve, []) if at == tokens
        }
        if len(found) == len(results):
            return found
    raise ValueError(f"not every candidate has a loss after {tokens:,} tokens")


def table(ranking: Ranking) -> str:
    """A line for each candidate, the best first."""
    rows = [
        [
            each.rank,
            each.zero_shot_rank,
            each.candidate.name,
            f"{each.candidate.figures['total_parameters']:,}",
            *([in_words(each.candidate.figures[ranking.cost])] if ranking.cost in TIMED else []),
            _shown(each.result["zero_shot"]),
            _shown(each.result["loss"]),
            f"{each.result['tokens']:,}",
            "front" if each.on_front else "diverged" if each.result.get("diverged") else "",
        ]
        for each in ranking.rows
    ]
    head = ["rank", "before", "candidate", "parameters"] + ([ranking.cost] if ranking.cost in TIMED else [])
    return tabulate(rows, [*head, "untrained loss", "loss", "tokens", ""], left=(2,))


def summary(ranking: Ranking) -> str:
    """How far the loss before training foretold the ranking, in one sentence."""
    count = len(ranking.rows)
    if ranking.correlation is None:
        return f"{counted(count, 'candidate')}: too few, or too alike, to compare the ranks before and after"
    said = f"Spearman correlation of the ranks before and after training: {ranking.correlation:.2f}"
    return f"{said}, over {count} candidates"


def _shown(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def _worse_when_larger(candidate: Candidate, cost: str) -> float:
    figure = candidate.figures[cost]
    return -figure if cost.endswith("throughput") else figure
