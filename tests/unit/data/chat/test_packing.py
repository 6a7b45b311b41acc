"""Rows of several samples, for any lengths."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_mcore.data.chat.packing import pack


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 60).flatmap(lambda most: st.tuples(st.just(most), st.lists(st.integers(1, most)))), st.integers(0, 9)
)
def test_every_unit_is_in_one_row_that_holds_it(sizes: tuple[int, list[int]], seed: int) -> None:
    capacity, lengths = sizes
    rows = pack(lengths, capacity, seed=seed)
    assert sorted(unit for row in rows for unit in row) == list(range(len(lengths)))
    used = [sum(lengths[unit] for unit in row) for row in rows]
    assert all(0 < each <= capacity for each in used)
    # No two rows would fit in one: half of each is used, but for one.
    assert all(one + other > capacity for i, one in enumerate(used) for other in used[:i])
    assert rows == pack(lengths, capacity, seed=seed)


def test_the_rows_are_few() -> None:
    """Within 11/9 of what the lengths add up to, plus 4; random lengths leave next to nothing free."""
    draws = random.Random(1)
    lengths = [draws.randint(1, 4096) for _ in range(20_000)]
    rows = pack(lengths, 4096, seed=3)
    least = -(-sum(lengths) // 4096)
    assert least <= len(rows) <= 1.02 * least


def test_the_seed_decides_among_equals() -> None:
    assert pack([1] * 8, 2, seed=0) != pack([1] * 8, 2, seed=1)
