"""The budget of `align` as iterations, once it is known how many rows the samples take."""

from __future__ import annotations

from typing import Any

import pytest

from minitron_mcore.alignment.config import AlignConfig
from minitron_mcore.jobs.align import timetable_of

LENGTH = 64  # positions of a row


def iterations(rows: int, units: int, global_batch_size: int, **budget: Any) -> int:
    timetable = timetable_of(AlignConfig(global_batch_size=global_batch_size, **budget), LENGTH, rows, units)
    assert timetable.tokens == timetable.iterations * global_batch_size * LENGTH
    return timetable.iterations


@pytest.mark.parametrize(
    ("rows", "samples", "size", "budget", "expected"),
    [
        (12, 12, 4, {"epochs": 1.0}, 3),
        (12, 12, 4, {"epochs": 2.0}, 6),
        (10, 10, 4, {"epochs": 1.0}, 3),  # the last batch takes two rows of the next pass
        (10, 10, 4, {"epochs": 2.0}, 5),
        (10, 10, 4, {"epochs": 0.5}, 2),
        (10, 10, 1, {"epochs": 0.1}, 1),
        (10, 10, 1, {"epochs": 0.3}, 3),  # of 3.0000000000000004 rows
        (3, 3, 8, {"epochs": 1.0}, 1),
        (12, 12, 4, {"samples": 8}, 2),
        (12, 12, 4, {"samples": 9}, 3),
        # Packed: of 60 samples in 12 rows 5 are a row.
        (12, 60, 1, {"samples": 5}, 1),
        (12, 60, 1, {"samples": 6}, 2),
        (12, 60, 4, {"samples": 120}, 6),
        (12, 60, 4, {"tokens": 2 * 4 * LENGTH}, 2),
    ],
)
def test_whole_global_batches(rows: int, samples: int, size: int, budget: dict[str, Any], expected: int) -> None:
    assert iterations(rows, samples, size, **budget) == expected


def test_a_budget_below_one_batch_is_one() -> None:
    assert iterations(12, 12, 4, samples=1) == iterations(12, 12, 4, tokens=LENGTH) == 1
