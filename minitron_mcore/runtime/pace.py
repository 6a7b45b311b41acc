"""How fast some work goes on, and how long the rest of it will take. Pure."""

from __future__ import annotations

import time

REPORT_SECONDS = 10.0


class Pace:
    """Of the work of this process, in any unit: a training that is resumed counts from where it starts."""

    def __init__(self, before: float = 0) -> None:
        """before: what was done by others, of what is done and of the total."""
        self.before = before
        self.started = self._said = time.perf_counter()

    @property
    def seconds(self) -> float:
        return max(time.perf_counter() - self.started, 1e-9)

    def rate(self, done: float) -> float:
        """Units a second."""
        return (done - self.before) / self.seconds

    def left(self, done: float, total: float) -> float:
        """Seconds that the rest will take, at the pace so far."""
        return self.seconds * max(total - done, 0) / max(done - self.before, 1e-9)

    def is_due(self, done: float, total: float) -> bool:
        """Whether to print a line: every REPORT_SECONDS, and at the end."""
        if time.perf_counter() - self._said < REPORT_SECONDS and done < total:
            return False
        self._said = time.perf_counter()
        return True

    def line(self, done: int, total: int, unit: str) -> str:
        return f"{done:,}/{total:,} {unit}, {self.rate(done):.3g} {unit}/s, {self.left(done, total):.0f} s left"
