"""What this process's main thread does, as it says itself: for others to see whether it goes on (watchdog.py). Pure.

Whatever takes long says so where it goes on: stages and iterations, the parts of a step (pace.py: timed, and Megatron's
timers), bars on every rank (progress.py), waits for the first rank (agree.py). It costs less than a microsecond.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pulse:
    """moved: when the main thread last went on (time.monotonic). stage: the verb. iteration: the one at work, in a
    training. doing: the last thing it began. steady: whether it tells often: in an iteration, but for the first one and
    what is `quiet` in it."""

    def __init__(self) -> None:
        self.moved = time.monotonic()
        self.stage = ""
        self.iteration: int | None = None
        self.doing = "start"
        self.steady = False

    def note(self, doing: str) -> None:
        """The main thread begins `doing`."""
        self.doing = doing
        self.moved = time.monotonic()

    def move(self) -> None:
        """It has got further with what it does."""
        self.moved = time.monotonic()

    def begin(self, iteration: int, *, steady: bool) -> None:
        """It begins an iteration of a training."""
        self.iteration, self.steady = iteration, steady
        self.note("batch-generator")

    @contextmanager
    def within(self, stage: str) -> Iterator[None]:
        """Within the `with` it carries out `stage`; stages may be nested."""
        before = self.stage
        self.stage, self.iteration, self.steady = stage, None, False
        self.note("start")
        try:
            yield
        finally:
            self.stage, self.iteration, self.steady = before, None, False
            self.note(f"after {stage}")

    @contextmanager
    def training(self) -> Iterator[None]:
        """Within the `with` iterations are begun; what follows the last one is none."""
        try:
            yield
        finally:
            self.iteration, self.steady = None, False
            self.note("after training")

    @contextmanager
    def quiet(self, doing: str) -> Iterator[None]:
        """Within the `with` it may tell nothing for long."""
        before, self.steady = self.steady, False
        self.note(doing)
        try:
            yield
        finally:
            self.steady = before
            self.note(f"after {doing}")


PULSE = Pulse()  # of this process
