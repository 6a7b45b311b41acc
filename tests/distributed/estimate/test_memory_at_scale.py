"""The forecast of what is held for a whole run at the papers' sizes, on 8 to 1,024 ranks that are not there: every part
of the ranks that benchmarks/memory_at_scale.py chooses, as Megatron lays it out on the `meta` device.

Weights to the byte. Gradients and optimizer state to 1%: Megatron pads its buffers, and shares them out by their length
in numbers, not by parameters; at these sizes that is less than a thousandth. A few layouts that differ in every part
here, the others are slow.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from tests.distributed.ranks import run_on_ranks

benchmark = importlib.import_module("benchmarks.memory_at_scale")
QUICK = (3, 4, 5, 7, 8)


def compared(number: int) -> list[dict[str, Any]]:
    return list(benchmark.compare(benchmark.CASES[number]))


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, marks=() if number in QUICK else pytest.mark.slow, id=f"{number}-{case.student}")
        for number, case in enumerate(benchmark.CASES)
    ],
)
def test_what_is_held_at_scale(number: int) -> None:
    rows = run_on_ranks(compared, 1, number)[0]
    case = benchmark.CASES[number]
    assert len(rows) == (4 + (case.teacher is not None)) * len({row["stage"] for row in rows}) > 0
    off = [row for row in rows if not benchmark.holds(row)]
    assert not off, f"{case}: {off}"
    assert all(abs(row["forecast"] - row["measured"]) <= row["measured"] / 1000 for row in rows), rows


def test_the_cases_are_spread() -> None:
    """Ten or more layouts from 8 to 1,024 ranks, each way to cut a model among them, and every shape of the papers'."""
    cases = benchmark.CASES
    assert len({(case.ranks, str(case.parallel)) for case in cases}) >= 10
    assert {8, 1024} <= {case.ranks for case in cases}
    used = {key for case in cases for key in case.parallel}
    assert used == {"tensor", "pipeline", "virtual_pipeline", "context", "sequence"}
    assert {name for case in cases for name in (case.student, case.teacher)} >= set(benchmark.SHAPES)
    assert {case.placement for case in cases} == {"resident", "sharded"}
