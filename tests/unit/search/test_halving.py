"""Which candidates train on, their order, and their files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.errors import InputError
from minitron_mcore.search.halving import best_first, finite, loss_at, read_result, survivors, write_result


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(0.5, "bd"), (0.1, "d"), (0.51, "abd"), (0.99, "abcd"), (0.25, "d"), (0.26, "bd")],
)
def test_survivors(keep: float, kept: str) -> None:
    assert survivors({"a": 3.0, "b": 2.0, "c": math.inf, "d": 1.0}, keep) == [*kept]


def test_of_equals_the_earlier_one_stays() -> None:
    assert survivors({"a": 2.0, "b": 1.0, "c": 1.0, "d": 1.0}, 0.5) == ["b", "c"]


def result(name: str, tokens: int, loss: float | None) -> dict[str, Any]:
    found = {"name": name, "zero_shot": 9.0, "loss": loss, "curve": [[0, 9.0], [tokens, loss]]}
    return {**found, "tokens": tokens, "rung": 1, "made_with": "x"}


def test_best_first() -> None:
    """Whoever was stopped at a rung comes after all that went on; whoever diverged comes last."""
    results = [result("late", 10, 1.0), result("gone", 20, None), result("b", 20, 3.0), result("a", 20, 2.0)]
    assert [each["name"] for each in best_first(results)] == ["a", "b", "late", "gone"]


def test_loss_at() -> None:
    assert loss_at(result("a", 5, 2.0), 5) == 2.0 and loss_at(result("a", 5, 2.0), 0) == 9.0
    assert loss_at(result("a", 5, None), 5) == loss_at(result("a", 5, 2.0), 7) == math.inf
    assert finite(1.5) == 1.5 and finite(math.nan) is None and finite(math.inf) is None


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "new" / "result.json"
    assert read_result(file) is None
    write_result(result("a", 5, None), file)
    assert read_result(file) == result("a", 5, None)
    for text in ("{", "[]", '{"name": "a"}'):
        file.write_text(text)
        with pytest.raises(InputError, match="not the result of a candidate"):
            read_result(file)
    with pytest.raises(ValueError, match="JSON"):
        write_result(result("a", 5, math.nan), file)
