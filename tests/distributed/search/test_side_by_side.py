"""Candidates side by side on subsets of the ranks, at other layouts, and by halving: the results of one after another.

Tolerance at another layout: 1e-4 on a loss of 7 after 4 steps of Adam at a learning rate of 1e-2, whose sums run in
another order. On the same layout and number of ranks a candidate is the same to the last bit wherever it is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_on_ranks
from tests.distributed.search.searching import search_on_rank

LAYOUTS = {
    "TP2": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "PP2": (2, ["parallel.pipeline=2"]),
    "DP2": (2, []),
}


@pytest.fixture(scope="module")
def root(corpus_with_teacher: Callable[[str], Path]) -> Path:
    return corpus_with_teacher("side_by_side")


@pytest.fixture(scope="module")
def alone(root: Path) -> list[dict[str, Any]]:
    return run_on_ranks(search_on_rank, 1, root, root / "alone")[0][0]


def by_name(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {result["name"]: result for result in results}


def test_two_at_a_time(root: Path, alone: list[dict[str, Any]]) -> None:
    ranks = run_on_ranks(search_on_rank, 2, root, root / "two", ["search.side_by_side=2"])
    assert ranks[0][0] == ranks[1][0] == alone
    shown = [printed.count("held-out loss") for _, printed in ranks]
    assert sum(shown) == 3 and min(shown) >= 1, "each subset has had its share"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts(layout: str, root: Path, alone: list[dict[str, Any]]) -> None:
    size, overrides = LAYOUTS[layout]
    ranks = run_on_ranks(search_on_rank, size, root, root / layout, overrides)
    ours, theirs = by_name(ranks[0][0]), by_name(alone)
    assert ours.keys() == theirs.keys()
    for name, result in theirs.items():
        assert ours[name]["zero_shot"] == pytest.approx(result["zero_shot"], abs=1e-5)
        assert ours[name]["loss"] == pytest.approx(result["loss"], abs=1e-4)
        assert ours[name]["made_with"] == result["made_with"]
