"""Which rank is the slow one, among those that do the same work."""

from __future__ import annotations

import pytest

from minitron_mcore.training.accounting import OwnTime, StepTimers
from minitron_mcore.training.stragglers import Slowest, slowest


@pytest.mark.parametrize(
    ("seconds", "stages", "expected"),
    [
        ([1.0, 1.0, 3.0, 1.0], 1, Slowest(2, 3.0, 3.0)),
        ([1.0, 2.0], 1, Slowest(1, 2.0, 2.0)),  # against the other one, not the median of both
        ([1.0, 1.0, 4.0, 5.0], 2, Slowest(3, 5.0, 1.25)),  # the second stage has more to do
        ([1.0, 4.0], 2, None),
        ([1.0], 1, None),
    ],
)
def test_the_slowest_rank(seconds: list[float], stages: int, expected: Slowest | None) -> None:
    assert slowest(seconds, stages) == expected


def test_in_words() -> None:
    line = Slowest(3, 0.8123, 1.618).in_words(40, "node-1")
    assert line == (
        " iteration 40 | slow: rank 3 on node-1: 812.3 ms an iteration for its data and passes, 1.62 times the others |"
    )


def test_own_passes_are_timed_at_every_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Megatron's schedule calls the timers; waits for other stages are left out."""
    now = [0.0]
    monkeypatch.setattr(OwnTime, "_now", staticmethod(lambda: now[0]))
    monkeypatch.setattr("minitron_mcore.training.accounting.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)  # which Megatron's timers call
    for level in (0, 2):
        timers = StepTimers(level)
        timers.start()
        for name, seconds in (("forward-compute", 2.0), ("forward-recv", 30.0), ("backward-compute", 5.0)) * 2:
            timers.timers(name, log_level=2).start()
            now[0] += seconds
            timers.timers(name).stop()
        assert timers.timers.own.take() == 14.0 and timers.timers.own.take() == 0.0
