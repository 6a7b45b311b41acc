"""Stopping a training in good order: Ctrl-C, SIGTERM (SLURM's warning before a time limit or a preemption) or SIGHUP
saves a checkpoint first, as does a closed output pipe (`| tee`, ended by the same Ctrl-C)."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from minitron_mcore.runtime.agree import is_main
from minitron_mcore.runtime.interrupt import at_once, install, name_of, restore, say_at_once


class StopRequest:
    """Remembers a signal to any rank; `on_any_rank` tells all ranks at the same iteration.

    A second signal, if either was Ctrl-C, goes to the previous handler at once.
    """

    def __init__(self) -> None:
        self.number = 0  # of the first signal
        self._answer = torch.zeros(1, dtype=torch.int64)
        self._arrival: torch.cuda.Event | None = None  # of the answer, from a GPU
        self._process = os.getpid()
        self._previous = install(self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a reader of data, just forked
        if at_once(self.number, number):
            self.restore()
            signal.raise_signal(number)
        elif not self.number:
            self.number = number
            if is_main():
                say_at_once(f"\n{name_of(number)}: this iteration will be finished and saved; Ctrl-C leaves at once")

    def on_any_rank(self) -> int:
        """The signal that asked any rank to stop, 0 for none. Every rank calls."""
        self.ask()
        return self.answer()[0]

    def ask(self, *values: int) -> None:
        """Begin to tell all ranks of a signal to this one, and of `values`. The host waits for nothing; all call."""
        device = torch.device(torch.cuda.current_device())
        numbers = torch.tensor([self.number, *values], pin_memory=device.type == "cuda").to(device, non_blocking=True)
        torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
        self._answer = numbers.to("cpu", non_blocking=True)
        if device.type == "cuda":
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def answer(self) -> list[int]:
        """Of what was asked last the largest on any rank: the signal, 0 for none, and of each of the values. Waits for
        nothing where the host has waited for the device since."""
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
