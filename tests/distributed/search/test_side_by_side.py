"""Candidates side by side on subsets of the ranks, at other layouts, and by halving: the results of one after another.

Tolerance at another layout: 1e-4 on a loss of 7 after 4 steps of Adam at a learning rate of 1e-2, whose sums run in
another order. On the same layout and number of ranks a candidate is the same to the last bit wherever it is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.errors import InputError
from minitron_mcore.runtime.world import World
from tests.distributed.ranks import run_on_ranks
from tests.distributed.search.searching import BATCH, NAMES, SHAPES, rows_of, search_on_rank, trials_of

# name -> (ranks, keys): the last one is two candidates at a time, each on two ranks.
LAYOUTS = {
    "PP2": (2, ["parallel.pipeline=2"]),
    "TP2 beside TP2": (4, ["parallel.tensor=2", "parallel.sequence=true", "search.side_by_side=2"]),
}
HALVED = ["search.halving.keep=0.4", f"search.halving.rungs=[{2 * BATCH}]"]


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


@pytest.mark.parametrize("layout", ["PP2", pytest.param("TP2 beside TP2", marks=pytest.mark.slow)])
def test_other_layouts(layout: str, root: Path, alone: list[dict[str, Any]]) -> None:
    size, overrides = LAYOUTS[layout]
    ranks = run_on_ranks(search_on_rank, size, root, root / layout, overrides)
    ours, theirs = by_name(ranks[0][0]), by_name(alone)
    assert ours.keys() == theirs.keys()
    for name, result in theirs.items():
        assert ours[name]["zero_shot"] == pytest.approx(result["zero_shot"], abs=1e-5)
        assert ours[name]["loss"] == pytest.approx(result["loss"], abs=1e-4)
        assert ours[name]["made_with"] == result["made_with"]


def test_halving(root: Path, alone: list[dict[str, Any]]) -> None:
    """Whoever trains on ends where it would have without a rung, and the others stop."""
    overrides = [*HALVED, "search.side_by_side=2", "search.keep_checkpoints=1"]
    results = run_on_ranks(search_on_rank, 2, root, root / "halved", overrides)[0][0]
    at_rung = {result["name"]: result["curve"][1] for result in results}
    assert {tokens for tokens, _ in at_rung.values()} == {2 * BATCH}
    # 0.4 of three candidates are two.
    best = sorted(at_rung, key=lambda name: at_rung[name][1])[:2]
    whole = by_name(alone)
    for result in results[:2]:
        assert result["name"] in best and (result["tokens"], result["rung"]) == (4 * BATCH, 2)
        assert result["loss"] == whole[result["name"]]["loss"] and len(result["curve"]) == 3
    stopped = results[2]
    assert (stopped["tokens"], stopped["rung"]) == (2 * BATCH, 1) and len(stopped["curve"]) == 2
    for result in results:
        ours, theirs = (root / name / "candidates" / result["name"] / "distilled" for name in ("halved", "alone"))
        done = 2 * result["rung"]
        there = [place.name for place in ours.glob("iter_*")]
        assert there == ([f"iter_{done:07d}"] if result is results[0] else []), "of the best alone"
        assert rows_of(ours) == rows_of(theirs)[:done]


def test_halving_by_shares(root: Path, alone: list[dict[str, Any]]) -> None:
    """Jobs that each take a share of one stop, in any order, and one that finds all there and ranks: as one search."""

    def share(*overrides: str) -> list[dict[str, Any]]:
        return run_on_ranks(search_on_rank, 1, root, root / "shares", [*HALVED, *overrides])[0][0]

    (second,) = share("search.stop=1", "search.share=1/2")
    with pytest.raises(InputError) as early:
        trials_of(root, root / "shares", [*HALVED, "search.stop=2"], World(), SHAPES)
    assert str(early.value) == (
        f"search.stop=2 needs all candidates at the stop before, where {NAMES[0]} has not been: train to search.stop=1 "
        "first"
    )
    first = share("search.stop=1", "search.share=0/2")
    assert [second["name"], *(each["name"] for each in first)] == [NAMES[1], NAMES[0], NAMES[2]]
    assert not (root / "shares" / "winner").exists()
    two_on = [*share("search.stop=2", "search.share=0/2"), *share("search.stop=2", "search.share=1/2")]
    ranked, whole = share(), by_name(alone)
    assert {each["name"] for each in ranked[:2]} == {each["name"] for each in two_on}
    assert [each["tokens"] for each in ranked] == [4 * BATCH, 4 * BATCH, 2 * BATCH]
    assert all(each["loss"] == whole[each["name"]]["loss"] for each in ranked[:2])
    assert (root / "shares" / "winner" / "plan.json").is_file()
    for words, said in (("search.stop=3", "is beyond the last stop, 2"), ("search.share=0/2", "has no effect without")):
        with pytest.raises(InputError, match=said):
            trials_of(root, root / "shares", [*HALVED, words], World(), SHAPES)
    with pytest.raises(InputError, match=r"search.share=2/2 must be NUMBER/COUNT, numbers from 0 on"):
        trials_of(root, root / "shares", ["search.stop=1", "search.share=2/2"], World(), SHAPES)


@pytest.mark.slow  # test_halving drops, too
def test_what_is_dropped_is_not_trained_again(root: Path, alone: list[dict[str, Any]]) -> None:
    """Nor is it missed: where a search goes on for longer, it begins anew and ends as if it had stayed."""
    few = ["search.keep_checkpoints=1", f"search.tokens={2 * BATCH}"]
    first = run_on_ranks(search_on_rank, 1, root, root / "few", few, SHAPES[:2])[0][0]
    left = {path.parent.parent.name for path in (root / "few" / "candidates").glob("*/distilled/iter_*")}
    assert left == {first[0]["name"]}
    again, shown = run_on_ranks(search_on_rank, 1, root, root / "few", few, SHAPES[:2])[0]
    assert again == first and "distill:" not in shown
    longer = run_on_ranks(search_on_rank, 1, root, root / "few", [], SHAPES[:2])[0][0]
    assert all(result["loss"] == by_name(alone)[result["name"]]["loss"] for result in longer)


@pytest.mark.slow  # test_halving stops and goes on, too
def test_a_longer_search_goes_on(root: Path, alone: list[dict[str, Any]]) -> None:
    first = run_on_ranks(search_on_rank, 1, root, root / "longer", [f"search.tokens={2 * BATCH}"], SHAPES[:1])[0][0]
    then, shown = run_on_ranks(search_on_rank, 1, root, root / "longer", [], SHAPES[:1])[0]
    assert "at iteration 2 of 8" in shown
    assert then[0]["curve"][:2] == first[0]["curve"]
    assert then[0]["loss"] == by_name(alone)[then[0]["name"]]["loss"]
