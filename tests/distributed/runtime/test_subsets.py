"""Subsets of the ranks are worlds of their own, share out work, and end together."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.distributed.ranks import RankError, run_on_ranks


def start_on_rank() -> Any:
    from minitron_mcore.runtime.start import start

    return start()


def total(value: int) -> int:
    import torch

    summed = torch.tensor(value)
    torch.distributed.all_reduce(summed)
    return int(summed)


def work_on_rank(numbers: int) -> dict[str, Any]:
    import torch.distributed as dist

    from minitron_mcore.runtime.config import ParallelConfig
    from minitron_mcore.runtime.groups import data_group, tensor_group
    from minitron_mcore.runtime.parallel import use_layout
    from minitron_mcore.runtime.subsets import apart

    runtime = start_on_rank()
    use_layout(ParallelConfig(tensor=4), 4)
    found: dict[str, Any] = {"before": tensor_group().size()}
    with apart(runtime, 2) as subset:
        own = subset.runtime
        use_layout(ParallelConfig(tensor=2), own.world_size)
        found |= {"place": (subset.index, own.rank, own.world_size, dist.get_rank(), dist.get_world_size())}
        found |= {"groups": (tensor_group().size(), data_group().size()), "sum": total(runtime.rank)}
        mine = []
        for number in subset.numbers(numbers):
            mine.append(own.broadcast(number))
            time.sleep(0.05)  # so that the other has its share
        found |= {"mine": mine, "all": subset.gathered(mine), "again": [*subset.numbers(0)]}
    use_layout(ParallelConfig(tensor=4), 4)
    return {**found, "after": (tensor_group().size(), total(runtime.rank), runtime.world_size)}


def test_each_subset_is_a_world() -> None:
    ranks = run_on_ranks(work_on_rank, 4, 7)
    assert [rank["place"] for rank in ranks] == [(0, 0, 2, 0, 2), (0, 1, 2, 1, 2), (1, 0, 2, 0, 2), (1, 1, 2, 1, 2)]
    assert [rank["sum"] for rank in ranks] == [0 + 1, 0 + 1, 2 + 3, 2 + 3]
    for rank in ranks:
        assert rank["before"] == 4 and rank["groups"] == (2, 1) and rank["after"] == (4, 6, 4)
        assert rank["all"] == [ranks[0]["mine"], ranks[2]["mine"]] and rank["again"] == []
        assert rank["mine"] == rank["all"][rank["place"][0]]
    first, second = ranks[0]["all"]
    assert sorted([*first, *second]) == list(range(7)) and first and second


def fail_on_rank(kind: str) -> str:
    """The message that a rank ends with, where the second of two subsets fails and the first one waits for it."""
    from minitron_mcore.errors import InputError
    from minitron_mcore.runtime.subsets import apart

    try:
        with apart(start_on_rank(), 2) as subset:
            if subset.index == 1:
                raise InputError("data.train", "x", "is gone") if kind == "input" else ValueError("a fault")
            subset.gathered(None)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def test_what_one_raises_all_raise() -> None:
    assert run_on_ranks(fail_on_rank, 4, "input") == ["InputError: data.train=x is gone"] * 4
    first, second, *own = run_on_ranks(fail_on_rank, 4, "other")
    assert own == ["ValueError: a fault"] * 2
    assert "of subset 2: a fault" in first and "of subset 2: a fault" in second


def lose_on_rank() -> None:
    from minitron_mcore.runtime.subsets import apart

    with apart(start_on_rank(), 2) as subset:
        if subset.index == 1 and subset.runtime.rank == 1:
            raise ValueError("alone")
        if subset.index == 1:
            total(1)
        subset.gathered(None)


def test_a_rank_that_fails_alone_leaves_nobody_waiting() -> None:
    """Its peer is in a collective with it, the other subset waits for both: all end, long before the time limit."""
    started = time.monotonic()
    with pytest.raises(RankError, match="ValueError: alone"):
        run_on_ranks(lose_on_rank, 4, timeout=60)
    assert time.monotonic() - started < 50


def alone_on_rank() -> list[Any]:
    from minitron_mcore.runtime.subsets import apart

    with apart(start_on_rank(), 1) as subset:
        return [[*subset.numbers(3)], subset.gathered("mine"), subset.runtime.world_size]


def test_one_subset_is_the_world() -> None:
    assert run_on_ranks(alone_on_rank, 1) == [[[0, 1, 2], ["mine"], 1]]
