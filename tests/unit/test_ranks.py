"""The multi-rank test helper itself."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import RankError, run_on_ranks


def rank_facts(offset: int, scale: int = 1) -> dict:
    total = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(total)
    return {
        "rank": dist.get_rank() * scale + offset,
        "environment": (os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"]),
        "total": total,
        "view": torch.arange(1000.0, requires_grad=True)[2:4] * 2,
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
    }


def uses_megatron() -> tuple[int, int]:
    from megatron.core import num_microbatches_calculator as calculator
    from megatron.core import parallel_state

    # Both refuse a second initialisation: a call that left them behind would fail the next one.
    assert not parallel_state.model_parallel_is_initialized(), "left over from the call before"
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    calculator.init_num_microbatches_calculator(0, None, 4, 2, 1)
    return parallel_state.get_tensor_model_parallel_world_size(), calculator.get_num_microbatches()


def fail_on_rank(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("the vocabulary is missing")
    dist.barrier()


def fail_while_another_hangs() -> None:
    word = torch.zeros(1)
    if dist.get_rank() == 1:
        dist.recv(word, 0)
        raise ValueError("first")
    dist.send(word, 1)
    time.sleep(1000)


def leave() -> None:
    if dist.get_rank() == 0:
        os._exit(17)
    dist.barrier()


def sleep_forever_here() -> None:
    if dist.get_rank() == 1:
        time.sleep(1000)
    dist.barrier()


def cannot_be_pickled() -> object:
    return lambda: None


def test_results_by_rank_and_reused_processes() -> None:
    first = run_on_ranks(rank_facts, 2, 10, scale=2)
    second = run_on_ranks(rank_facts, 2, 10, scale=2)
    assert [facts["rank"] for facts in first] == [10, 12]
    assert [facts["environment"] for facts in first] == [("0", "0", "2"), ("1", "1", "2")]
    assert all(facts["total"].item() == 3.0 and facts["threads"] == 1 for facts in first)
    assert all(torch.equal(facts["view"], torch.tensor([4.0, 6.0])) for facts in first)
    assert not first[0]["view"].requires_grad
    assert [facts["pid"] for facts in first] == [facts["pid"] for facts in second]


def test_megatron_state_is_fresh_each_call() -> None:
    assert run_on_ranks(uses_megatron, 2) == [(2, 2)] * 2
    assert run_on_ranks(uses_megatron, 1) == [(1, 2)]
    assert run_on_ranks(uses_megatron, 2) == [(2, 2)] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_failure_shows_the_failing_ranks_traceback_and_the_pool_survives(rank: int) -> None:
    with pytest.raises(RankError, match="the vocabulary is missing") as raised:
        run_on_ranks(fail_on_rank, 2, rank)
    assert raised.value.rank == rank
    assert "fail_on_rank" in str(raised.value) and "line" in str(raised.value)
    assert isinstance(raised.value.__cause__, KeyError)
    assert [facts["rank"] for facts in run_on_ranks(rank_facts, 2, 0)] == [0, 1]


def test_hung_rank_is_replaced() -> None:
    before = [facts["pid"] for facts in run_on_ranks(rank_facts, 2, 0)]
    with pytest.raises(RankError, match="ValueError: first") as raised:
        run_on_ranks(fail_while_another_hangs, 2)
    assert raised.value.rank == 1
    assert "fail_while_another_hangs" in str(raised.value).split("rank 0 stands at")[1]
    after = [facts["pid"] for facts in run_on_ranks(rank_facts, 2, 0)]
    assert before[1] in after and before[0] not in after


def test_dead_process_and_unpicklable_result() -> None:
    with pytest.raises(RankError, match="exit code 17"):
        run_on_ranks(leave, 2)
    with pytest.raises(RankError, match="pickle"):
        run_on_ranks(cannot_be_pickled, 1)
    assert len(run_on_ranks(rank_facts, 2, 0)) == 2


def test_timeout_says_where_each_rank_stands() -> None:
    with pytest.raises(RankError, match=r"ranks \[0, 1\] not done after 3 s") as raised:
        run_on_ranks(sleep_forever_here, 2, timeout=3.0)
    assert raised.value.rank is None
    zero, one = str(raised.value).split("rank 1 stands at")
    assert "barrier" in zero and "sleep_forever_here" in one


def test_only_module_level_functions() -> None:
    with pytest.raises(ValueError, match="module-level"):
        run_on_ranks(lambda: None, 1)
