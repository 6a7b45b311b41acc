"""Ranks agree or fail together: what one rank gives, or raises, reaches every rank."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from minitron_mcore.errors import InputError, StorageError
from minitron_mcore.runtime.agree import all_or_none, broadcast, end_together, gathered, is_main, on_main
from tests.distributed.ranks import run_on_ranks

KINDS = {"InputError": InputError, "StorageError": StorageError}


def together_on_rank(way: str, works: str) -> list[Any]:
    """What three calls in turn gave or raised on this rank: one that works, the one asked for, one that works."""
    rank = torch.distributed.get_rank()
    done, call = [], {"on_main": on_main, "all_or_none": all_or_none}[way]
    who = 0 if way == "on_main" else 1  # a rank that alone fails

    def act(works: str) -> int:
        done.append(rank)
        if works in KINDS and rank == who:
            raise KINDS[works]("train.lr", -1, "must be at least 0", "raise it")
        if works == "fails" and rank == who:
            raise KeyError("iteration")
        return rank

    results: list[Any] = []
    for kind in ("works", works, "works"):
        try:
            results.append(call(lambda kind=kind: act(kind)))  # type: ignore[misc]
        except InputError as error:
            results.append((type(error).__name__, error.exit_code, *error.args))
        except Exception as error:
            results.append((type(error).__name__, str(error)))
    assert len(done) == (0 if way == "on_main" and rank else 3)
    return results


def test_every_rank_has_its_own_result_or_the_first_ones() -> None:
    assert run_on_ranks(together_on_rank, 2, "on_main", "works") == [[0, 0, 0]] * 2
    assert run_on_ranks(together_on_rank, 2, "all_or_none", "works") == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("way", ["on_main", "all_or_none"])
def test_one_ranks_failure_is_raised_on_every_rank(way: str) -> None:
    """The user's mistake with its parts and its exit code; anything else beside the rank's own; then all go on."""
    for kind, code in (("InputError", 2), ("StorageError", 1)):
        for results in run_on_ranks(together_on_rank, 2, way, kind):
            assert results[1] == (kind, code, "train.lr", -1, "must be at least 0", "raise it")
    failing = 0 if way == "on_main" else 1
    found = run_on_ranks(together_on_rank, 2, way, "fails")
    assert found[failing][1] == ("KeyError", "'iteration'")
    assert found[1 - failing][1] == ("RuntimeError", f"rank {failing}: 'iteration'")
    assert all(results[0] == results[2] for results in found)


def values_on_rank() -> tuple[Any, ...]:
    rank = torch.distributed.get_rank()
    return gathered({rank}), broadcast([rank]), is_main()


def test_values_of_every_rank_and_of_the_first() -> None:
    assert run_on_ranks(values_on_rank, 2) == [([{0}, {1}], [0], True), ([{0}, {1}], [0], False)]


def test_a_single_process_needs_no_group() -> None:
    assert (gathered(1), broadcast(2), on_main(lambda: 3), all_or_none(lambda: 4), is_main()) == ([1], 2, 3, 4, True)
    for call in (on_main, all_or_none):
        with pytest.raises(KeyError, match="lost"):
            call(lambda: {"": 0}["lost"])


def end_on_rank() -> tuple[float, float]:
    """When this rank was done, and when it left."""
    if torch.distributed.get_rank() == 1:
        time.sleep(0.7)
    done = time.monotonic()
    end_together()
    return done, time.monotonic()


def test_no_rank_leaves_before_all_are_done() -> None:
    """One system's clock is the same for its processes. Twice: each time they meet anew."""
    for _ in range(2):
        found = run_on_ranks(end_on_rank, 2)
        assert min(left for _, left in found) >= max(done for done, _ in found)
        assert max(left for _, left in found) < max(done for done, _ in found) + 4, "not by the time that is up"
