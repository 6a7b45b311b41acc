"""Start-up: which layouts there can be; what generators take. Who a process is: test_world.py."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch

from minitron_mcore.errors import InputError
from minitron_mcore.recipe import MOST_SEED, Recipe
from minitron_mcore.runtime.config import ParallelConfig, check_layout
from minitron_mcore.runtime.parallel import seed_everything
from minitron_mcore.runtime.world import collective_timeout
from tests.distributed.ranks import run_on_ranks


@pytest.mark.parametrize(
    ("parallel", "world_size", "words"),
    [
        ({"tensor": 2}, 3, "parallel.tensor=2 x parallel.pipeline=1 = 2 ranks for one copy of the model, but 3 were"),
        ({"tensor": 4, "pipeline": 3}, 8, "parallel.tensor=4 x parallel.pipeline=3 = 12 ranks"),
        ({"tensor": 4, "pipeline": 3}, 8, "start a multiple of 12, or change parallel.*"),
        ({"tensor": 0}, 1, "tensor=0 must be at least 1"),
        ({"pipeline": -2}, 1, "pipeline=-2 must be at least 1"),
        ({"context": 0}, 1, "context=0 must be at least 1"),
        ({"context": 2}, 3, "parallel.context=2 = 2 ranks for one copy of the model, but 3 were"),
        ({"pipeline": 2, "virtual_pipeline": 1}, 2, "virtual_pipeline=1 must be at least 2: leave it out"),
        ({"virtual_pipeline": 2}, 1, "virtual_pipeline=2 needs pipeline of at least 2"),
        ({"sequence": True}, 1, "sequence=true cuts the sequence over tensor-parallel ranks, but tensor=1"),
    ],
)
def test_impossible_layouts_are_refused(parallel: dict[str, Any], world_size: int, words: str) -> None:
    with pytest.raises(InputError) as caught:
        check_layout(ParallelConfig(**parallel), world_size)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("parallel", "world_size"),
    [
        ({}, 1),
        ({}, 7),
        ({"tensor": 4}, 8),
        ({"context": 2}, 4),
        ({"tensor": 2, "pipeline": 2, "virtual_pipeline": 3, "sequence": True}, 12),
    ],
)
def test_possible_layouts_are_not(parallel: dict[str, Any], world_size: int) -> None:
    check_layout(ParallelConfig(**parallel), world_size)


def groups_on_rank(layouts: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
    """(tensor, pipeline, data) sizes of one layout after another in the same processes."""
    from megatron.core import parallel_state

    from minitron_mcore.runtime.parallel import use_layout

    found: list[tuple[int, int, int]] = []
    for parallel in layouts:
        use_layout(ParallelConfig(**parallel), 2)
        group = parallel_state.get_tensor_model_parallel_group()
        use_layout(ParallelConfig(**parallel), 2)
        assert group is parallel_state.get_tensor_model_parallel_group(), "the same layout keeps its groups"
        found.append(
            (
                parallel_state.get_tensor_model_parallel_world_size(),
                parallel_state.get_pipeline_model_parallel_world_size(),
                parallel_state.get_data_parallel_world_size(),
            )
        )
    return found


def test_layouts_follow_one_another() -> None:
    layouts: list[dict[str, Any]] = [{"tensor": 2}, {"pipeline": 2}, {}, {"tensor": 2}]
    assert run_on_ranks(groups_on_rank, 2, layouts) == [[(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 1)]] * 2


def started_on_rank() -> tuple[Any, ...]:
    from minitron_mcore.runtime.start import start, stop

    first = start()
    stop()
    second = start()  # in the same process, as a second stage would
    facts = (second.rank, second.world_size, second.local_rank, second.is_main, str(second.device))
    total = torch.tensor([1.0 + second.rank])
    torch.distributed.all_reduce(total)
    stop()
    stop()
    return (first.rank, torch.distributed.is_initialized(), float(total), *facts)


def test_start_and_stop() -> None:
    assert run_on_ranks(started_on_rank, 2) == [
        (0, False, 3.0, 0, 2, 0, True, "cpu"),
        (1, False, 3.0, 1, 2, 1, False, "cpu"),
    ]


def test_collectives_wait_as_long_as_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINITRON_TIMEOUT_MINUTES", raising=False)
    assert collective_timeout() == timedelta(minutes=30)
    monkeypatch.setenv("MINITRON_TIMEOUT_MINUTES", "90")
    assert collective_timeout() == timedelta(minutes=90)
    for value in ("0", "1.5", "long"):
        monkeypatch.setenv("MINITRON_TIMEOUT_MINUTES", value)
        with pytest.raises(InputError, match=f"MINITRON_TIMEOUT_MINUTES={value} must be a whole number of minutes"):
            collective_timeout()


def seed_and_draw(seeds: list[int]) -> list[float]:
    from minitron_mcore.runtime.parallel import use_layout
    from minitron_mcore.runtime.start import start

    start()
    use_layout(ParallelConfig(), 1)
    drawn = []
    for seed in seeds:
        seed_everything(seed)
        drawn.append(float(torch.rand(())))
    return drawn


def test_generators_take_every_seed_that_a_recipe_may_have() -> None:
    assert len(set(run_on_ranks(seed_and_draw, 1, [0, 1234, MOST_SEED])[0])) == 3
    for seed in (MOST_SEED + 1, -1, 99999999999999999999):
        with pytest.raises(InputError, match=f"seed={seed} must lie between 0 and 9223372036854775807"):
            Recipe(seed=seed)
