"""Timing a part of a step with Megatron's own Timers, if there are any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def timed(timers: Any, name: str, log_level: int = 2) -> Iterator[None]:
    """Add the time spent in the `with` to the timer `name` of `timers` (megatron.core.timers.Timers; None: no timing).

    Nothing is measured if `log_level` is above that of `timers`. On CUDA both ends wait for the device.
    """
    if timers is None:
        yield
        return
    timer = timers(name, log_level=log_level)
    timer.start()
    yield
    timer.stop()
