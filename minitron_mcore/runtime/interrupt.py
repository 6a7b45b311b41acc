"""Ctrl-C (SIGINT), SIGTERM, SIGUSR1 and SIGHUP: the first ends this process in good order, a second one at once.

Outside a training the first raises `Interrupted`, which unwinds as any error does, so that nothing half-made is left.
A training remembers it instead, and saves (training/signals.py). torchrun sends a second Ctrl-C on as SIGTERM.

One signal may arrive twice: SLURM signals a launcher and its ranks alike, and the launcher hands on what it got. So,
but for Ctrl-C, a second one is one that comes later than such an ECHO, and it lets a checkpoint be written to its end.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from minitron_mcore.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
PATIENCE = 2.0  # seconds before a line acknowledges a signal
ECHO = 5.0  # seconds in which a signal may arrive again by another way
# What else may ask a training to stop, beside the numbers of signals.
EXIT_INTERVAL, EXIT_DURATION = 101, 102
LIMITS = {EXIT_INTERVAL: "exit_interval", EXIT_DURATION: "exit_duration_in_mins"}
# The exit code of what was stopped in good order and is to be started again. srun gives the highest code of its tasks,
# but 143 once one has died of the SIGTERM by which it ends the others. So it is above that of every signal, and who
# leaves with it ignores SIGTERM.
UNFINISHED = 200
# Of ranks that hang (watchdog.py): EX_TEMPFAIL of sysexits.h where nothing was finished before, and else one that is
# above every signal's too and asks for another start.
HUNG, HUNG_LATER = 75, 201

_endings: set[Ending] = set()  # at most one, while the command line runs a verb
_saving: list[Callable[[], bool]] = []  # each tells whether a checkpoint is being written


def _let_go() -> None:
    """A forked child, such as a reader of data, would write its signals into its parent's pipe."""
    for ending in _endings:
        ending.leave_pipe()
    _endings.clear()


os.register_at_fork(after_in_child=_let_go)


def install(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Make `handler` this process's for SIGNALS; returns the handlers before it, for `restore`. In a thread other than
    the main one nothing happens. A SIGHUP that nohup had ignored stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    kept = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
    return {number: signal.signal(number, handler) for number in SIGNALS if number not in kept}


def restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler or signal.SIG_DFL)  # None: not set from Python, which cannot be restored


def outlive_signals(worker: int) -> None:
    """For a reader of data: terminals, torchrun and SLURM signal whole process groups, and a reader that died of a
    signal would end its rank before that has saved. Readers end when their rank does."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def at_once(first: int, number: int, later: float) -> bool:
    """Whether a signal `number`, `later` seconds after a `first` one (0: none), asks to exit without waiting."""
    if not first or signal.SIGINT in (first, number):
        return bool(first)
    return later > ECHO and not is_saving()


def is_saving() -> bool:
    """Whether a checkpoint is being written, which a second SIGTERM does not break off."""
    return any(saving() for saving in _saving)


@contextmanager
def sparing(saving: Callable[[], bool]) -> Iterator[None]:
    """Within the `with`, `saving` tells whether a checkpoint is being written. Any thread may ask it."""
    _saving.append(saving)
    try:
        yield
    finally:
        _saving.remove(saving)


def name_of(reason: int) -> str:
    """Of a signal, or of one of LIMITS."""
    return "Ctrl-C" if reason == signal.SIGINT else LIMITS.get(reason) or signal.Signals(reason).name


def exit_code(number: int) -> int:
    """As a shell has it, of work that a signal has broken off."""
    return 128 + number


def stopped_code(reason: int) -> int:
    """Of a stop in good order, after which the same command goes on: that of the signal where a person asked for it, by
    Ctrl-C, a closed terminal or a closed pipe, else UNFINISHED."""
    return exit_code(reason) if reason in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE) else UNFINISHED


def made_progress() -> None:
    """Have it known that something is finished for good: what SIGUSR1, the warning of a time limit, breaks off later is
    worth starting again, and so is what hangs later."""
    for ending in _endings:
        ending.progress = True


def hung_code() -> int:
    return HUNG_LATER if any(ending.progress for ending in _endings) else HUNG


def began() -> float:
    """When this process's verb began, of time.monotonic; now, where no command line did."""
    return min((ending.began for ending in _endings), default=time.monotonic())


def say_at_once(words: str) -> None:
    """Write to the terminal, wherever Python is; one that is gone does no harm."""
    with suppress(OSError):
        os.write(2, f"{words}\n".encode())


class Ending:
    """Within this context the first of SIGNALS raises Interrupted in the main thread. A second one exits at once, by a
    thread of its own, since the main one may be stuck in a collective."""

    def __init__(self) -> None:
        self.number = 0  # the first signal that was raised
        self.began = time.monotonic()
        self.progress = False  # something was finished before
        self._left_with = 0  # the exit code of a stop in good order
        self._process = os.getpid()
        self._handlers: dict[int, Any] = {}
        self._pipe = -1

    def __enter__(self) -> Ending:
        self._handlers = install(self._raise)
        if self._handlers:
            reading, self._pipe = os.pipe()
            os.set_blocking(self._pipe, False)
            self._pipe_before = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
            _endings.add(self)
            threading.Thread(target=self._watch, args=(reading,), name="signals", daemon=True).start()
        return self

    def __exit__(self, kind: object, error: object, where: object) -> None:
        if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:
            self._left_with = error.code
            self.number = self.number or error.code - 128
        if self._left_with:
            # srun ends the other tasks by SIGTERM as soon as one has left, and Python's handlers are gone before the
            # process is.
            self._ignore()
        if self.number:
            return  # until the process exits, a repeated signal must do no harm, and Ctrl-C must still work
        restore(self._handlers)
        if self._pipe >= 0:
            _endings.discard(self)
            signal.set_wakeup_fd(self._pipe_before)
            self.leave_pipe()

    def _ignore(self) -> None:
        for number in self._handlers.keys() - {signal.SIGINT}:
            signal.signal(number, signal.SIG_IGN)

    def leave_pipe(self) -> None:
        if self._pipe >= 0:
            if os.getpid() != self._process:
                signal.set_wakeup_fd(-1)
            os.close(self._pipe)  # ends the thread
            self._pipe = -1

    @property
    def code(self) -> int:
        """The exit code of what `number` has broken off."""
        return UNFINISHED if self.progress and self.number == signal.SIGUSR1 else exit_code(self.number)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        # Once: the clean-up that follows must not be interrupted.
        if os.getpid() == self._process and not self.number:
            self.number = number
            raise Interrupted(number)

    def settle(self) -> None:
        """Let a pending signal arrive: a failure may be due to a rank that received it earlier."""

    def _watch(self, reading: int) -> None:
        """Read the pipe, into which each signal's number is written at once, whatever the main thread does."""
        first, since = 0, 0.0
        while True:
            # The handler runs only once a library returns to Python, which may take a while.
            waits = first and not select.select([reading], [], [], PATIENCE)[0] and not self.number
            if waits and signal.getsignal(first) == self._raise:
                say_at_once(f"\n{name_of(first)}: stops as soon as it can; Ctrl-C, or another signal, leaves at once")
            numbers = os.read(reading, 64)
            if not numbers:
                return os.close(reading)
            for number in numbers:
                if number in SIGNALS and at_once(first, number, time.monotonic() - since):
                    say_at_once("minitron: left at once; what was saved before is whole")
                    by_hand = signal.SIGINT in (first, number)
                    os._exit(exit_code(signal.SIGINT) if by_hand else self._left_with or exit_code(number))
                if number in SIGNALS and not first:
                    first, since = number, time.monotonic()


@contextmanager
def held_back() -> Iterator[None]:
    """Processes started within the `with` never get a Ctrl-C, nor SIGUSR1: the process that starts them ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
