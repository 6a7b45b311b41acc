"""Stopping a training in good order: Ctrl-C, SIGTERM, SIGUSR1 (SLURM's warnings before a preemption or a time limit) or
SIGHUP saves a checkpoint first. So does a closed output pipe (`| tee`, ended by the same Ctrl-C), or a time that is up.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from minitron_mcore.runtime.agree import is_main
from minitron_mcore.runtime.interrupt import (
    ECHO,
    EXIT_DURATION,
    at_once,
    install,
    is_saving,
    name_of,
    restore,
    say_at_once,
)


class StopRequest:
    """Remembers a signal to any rank; `on_any_rank` tells all ranks at the same iteration.

    A second signal (interrupt.py: at_once) goes to the previous handler at once.
    """

    def __init__(self, ends_at: float = float("inf")) -> None:
        """ends_at: of time.monotonic, from which on every iteration is to be the last."""
        self.number = 0  # of the first signal
        self._since = 0.0  # when it came
        self._ends_at = ends_at
        self._answer = torch.zeros(1, dtype=torch.int64)
        self._arrival: torch.cuda.Event | None = None  # of the answer, from a GPU
        self._process = os.getpid()
        self._previous = install(self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a reader of data, just forked
        later = time.monotonic() - self._since
        if at_once(self.number, number, later):
            self.restore()
            signal.raise_signal(number)
        elif not self.number:
            self.number, self._since = number, time.monotonic()
            if is_main():
                how = f"Ctrl-C, or another signal after {ECHO:.0f} s, leaves at once"
                say_at_once(f"\n{name_of(number)}: this iteration will be finished and saved; {how}")
        elif later > ECHO and is_saving() and is_main():
            say_at_once(f"\n{name_of(number)}: leaves when the checkpoint is written; Ctrl-C leaves at once")

    @property
    def reason(self) -> int:
        """Why this rank asks to stop: the first signal, or EXIT_DURATION where its time is up; 0: it does not."""
        return self.number or (EXIT_DURATION if time.monotonic() >= self._ends_at else 0)

    def on_any_rank(self) -> int:
        """Why any rank asks to stop, 0 if none does. Every rank calls."""
        self.ask()
        return self.answer()[0]

    def ask(self, *values: int) -> None:
        """Begin to tell all ranks of this one's `reason`, and of `values`. The host waits for nothing; all call."""
        device = torch.device(torch.cuda.current_device())
        numbers = torch.tensor([self.reason, *values], pin_memory=device.type == "cuda").to(device, non_blocking=True)
        torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
        self._answer = numbers.to("cpu", non_blocking=True)
        if device.type == "cuda":
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def answer(self) -> list[int]:
        """Of what was asked last the largest on any rank: the reason to stop, 0 for none, and of each of the values.
        Waits for nothing where the host has waited for the device since."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._answer.tolist()

    def outliving_the_reader(self) -> contextlib.redirect_stdout[Any]:
        """Within the `with`, output that nobody reads is no failure, but a request to stop (SIGPIPE)."""
        return contextlib.redirect_stdout(_Outliving(sys.stdout, self))

    def restore(self) -> None:
        restore(self._previous)
        self._previous = {}


class _Outliving:
    """A stream whose reader may disappear."""

    def __init__(self, stream: Any, stop: StopRequest) -> None:
        self._stream, self._stop = stream, stop

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable[..., Any], *text: str) -> None:
        try:
            call(*text)
        except BrokenPipeError:
            self._stop.number = self._stop.number or signal.SIGPIPE
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
