"""Rate and time left of long work."""

from __future__ import annotations

import time

import pytest

from minitron_mcore.runtime.pace import Pace


def test_the_time_left_counts_from_where_a_process_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """600 of 1000 tokens were there; 100 took 20 s, so 300 take 60."""
    now = 1000.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    pace = Pace(600)
    assert pace.left(600, 1000) > 1, "no pace is known yet"
    now = 1020.0
    assert (pace.seconds, pace.rate(700), pace.left(700, 1000)) == (20.0, 5.0, 60.0)
    now = 1080.0
    assert pace.left(1000, 1000) == 0
