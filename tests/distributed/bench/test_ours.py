"""Our engine without enough memory, at several layouts: what it is asked next, and what is told of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_mcore.bench.figures import Case
from minitron_mcore.bench.measure import Measured
from tests.distributed.models import LAYOUTS, start_layout, tiny
from tests.distributed.ranks import RankError, run_on_ranks

SMALL, LARGE, LAST = CASES = Case(2, 3, 2), Case(2, 9, 2), Case(3, 3, 2)


def measured_on_rank(parallel: dict[str, Any], world_size: int, who: list[int]) -> Measured:
    """Of two models: the ranks `who` have no memory for the weights of one, and none for the cache of LARGE."""
    from minitron_mcore.bench import measure, ours
    from minitron_mcore.inference import engine
    from minitron_mcore.model.gpt import build_model

    layout, architecture = start_layout(parallel, world_size), tiny("llama")
    load, cache = ours.load_model, engine._Cache
    is_starved = torch.distributed.get_rank() in who

    def starved_load(place: tuple[Path, int], *_: Any) -> Any:
        if is_starved and place[1] == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return build_model(architecture, layout, "fp32", trainable=False)

    class StarvedCache(cache):  # type: ignore[misc, valid-type]
        def __init__(self, chunks: Any, rows: int, positions: int, *others: Any, **how: Any) -> None:
            if is_starved and positions == LARGE.prompt_tokens + LARGE.output_tokens:
                torch.empty(1 << 55)  # what the allocator itself says
            super().__init__(chunks, rows, positions, *others, **how)

    ours.load_model, engine._Cache, ours.PATIENCE = starved_load, StarvedCache, 2.0  # type: ignore[assignment, misc]
    try:
        return measure.measure(
            [ours.Ours(f"model {number}", (Path(), number), architecture, layout, "fp32", 3) for number in range(2)],
            CASES,
            lambda seat, case: [list(range(case.prompt_tokens))] * case.batch_size,
            repeats=2,
            warmup=0,
            together=True,
            say=lambda words: None,
        )
    finally:
        ours.load_model, engine._Cache, ours.PATIENCE = load, cache, 60.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "who"), [("1", [0]), ("DP2", [0]), ("DP2", [1]), ("TP2", [0, 1]), ("PP2", [0, 1])], ids=str
)
def test_memory_that_runs_out_costs_a_model_or_a_size(name: str, who: list[int]) -> None:
    """Every rank is told, and the rest is measured; also where but one data-parallel rank had none."""
    world_size, parallel = LAYOUTS[name]
    for found in run_on_ranks(measured_on_rank, world_size, parallel, world_size, who):
        no_model, no_size = ("minitron", "model 1"), ("minitron", "model 0")
        assert found.failures.keys() == {(no_model, None), (no_size, LARGE)}
        assert found.failures[no_model, None].startswith("out of memory: CUDA out of memory. Tried to")
        assert "DefaultCPUAllocator" in found.failures[no_size, LARGE]
        assert [found.is_whole(no_size, case) for case in CASES] == [True, False, True]
        assert [len(tokens) for tokens in found.tokens[no_size, LAST]] == [2] * 3


def test_a_rank_that_the_others_wait_for_leaves() -> None:
    """Of a tensor-parallel pair one alone: the other is in a collective, and a launcher must end it."""
    with pytest.raises(RankError, match="DefaultCPUAllocator") as caught:
        run_on_ranks(measured_on_rank, 2, {"tensor": 2}, 2, [1])
    assert caught.value.rank == 1
