"""A run that goes on says so where it reads other data, or in another order, than it has."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minitron_mcore.training.job import Progress, data_order
from minitron_mcore.training.loop import warn_of_other_data


def texts(order: list[int], length: int = 4) -> list[dict[str, torch.Tensor]]:
    return [{"tokens": torch.full((length,), number)} for number in order]


def told(before: dict[int, str], now: dict[int, str]) -> str:
    lines: list[str] = []
    job: Any = SimpleNamespace(
        data=SimpleNamespace(order=now), folder=Path("run"), runtime=SimpleNamespace(print=lines.append)
    )
    warn_of_other_data(Progress(data_order=before), job)
    return "".join(lines)


def test_the_order_is_told() -> None:
    forward = data_order({4: texts([1, 2, 3])})
    assert forward == data_order({4: texts([1, 2, 3])}) and set(forward) == {4}
    assert forward != data_order({4: texts([1, 3, 2])}), "shuffled otherwise"
    assert data_order({4: texts(list(range(9)))}) == data_order({4: texts([*range(8), 99])}), "the first eight tell"


@pytest.mark.parametrize(
    ("now", "is_told"),
    [
        ({4: "a"}, False),
        ({4: "a", 8: "c"}, False),  # sequences of another length come after
        ({4: "b"}, True),
        ({8: "c", 4: "b"}, True),
    ],
)
def test_other_data_is_a_warning(now: dict[int, str], is_told: bool) -> None:
    assert ("WARNING: run has read other samples" in told({4: "a"}, now)) == is_told


def test_a_checkpoint_that_does_not_tell() -> None:
    assert told({}, {4: "a"}) == ""
