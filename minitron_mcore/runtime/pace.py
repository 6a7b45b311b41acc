"""How fast some work goes on, how long the rest of it will take, and the time of a part of it. Pure."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from minitron_mcore.runtime.pulse import PULSE


class Pace:
    """Of the work of this process, in any unit: a training that is resumed counts from where it starts."""

    def __init__(self, before: float = 0) -> None:
        """before: what was done by others, of what is done and of the total."""
        self.before = before
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return max(time.perf_counter() - self.started, 1e-9)

    def rate(self, done: float) -> float:
        """Units a second."""
        return (done - self.before) / self.seconds

    def left(self, done: float, total: float) -> float:
        """Seconds that the rest will take, at the pace so far."""
        return self.seconds * max(total - done, 0) / max(done - self.before, 1e-9)


def duration(seconds: float) -> str:
    """As in `0:01:40` or `2d 4:03:04`."""
    return str(timedelta(seconds=round(seconds))).replace(" days, ", "d ").replace(" day, ", "d ")


@contextmanager
def timed(timers: Any, name: str, log_level: int = 2) -> Iterator[None]:
    """Add the time spent in the `with` to the timer `name` of `timers` (megatron.core.timers.Timers; None: no timing).

    The pulse is told of it. Nothing is measured if `log_level` is above that of `timers`. On CUDA both ends wait for
    the device.
    """
    PULSE.note(name)
    if timers is None:
        yield
        return
    timer = timers(name, log_level=log_level)
    timer.start()
    yield
    timer.stop()
