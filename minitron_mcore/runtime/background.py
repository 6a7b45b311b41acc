"""Work done by a forked copy of this process while this one goes on: it sees the memory as it was at the fork.

The copy takes part in no collective (gloo's threads and NCCL's stay here) and touches no GPU. It ends with this
process, however that ends, so that nobody writes on after a run that was killed and started again.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

import torch

from minitron_mcore.runtime.interrupt import outlive_signals

_PR_SET_PDEATHSIG = 1  # Linux: the signal that a process gets when the thread that forked it ends

T = TypeVar("T")


class Background(Generic[T]):
    """The picklable result of `work`, on its way. One thread uses it, the one that may fork: the main one."""

    def __init__(self, work: Callable[[], T]) -> None:
        """Raises OSError where there is no memory for a fork."""
        context = multiprocessing.get_context("fork")
        self._results, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(work, theirs, os.getpid()))
        try:
            self._process.start()
        finally:
            theirs.close()  # so that the end of the process is the end of the pipe
        self._found: tuple[Any, BaseException | None] | None = None

    @property
    def is_running(self) -> bool:
        """Whether `result` would wait."""
        return self._found is None and not self._results.poll()

    def result(self) -> T:
        """What `work` gave; waits for it. Raises what `work` raised, or ChildProcessError where the process died."""
        if self._found is None:
            try:
                self._found = self._results.recv()
            except EOFError:
                self._process.join()
                self._found = None, ChildProcessError(_ended(self._process.exitcode))
            self._close()
        assert self._found is not None
        value, error = self._found
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def stop(self) -> None:
        """End it, if it still runs; `result` then raises."""
        if self._found is None:
            self._process.kill()
            self._found = None, ChildProcessError("it was stopped")
            self._close()

    def _close(self) -> None:
        self._process.join()
        self._results.close()


def _work(work: Callable[[], Any], results: Connection, parent: int) -> None:
    end_with(parent)
    os.register_at_fork(after_in_child=partial(end_with, os.getpid()))  # what `work` itself forks
    outlive_signals(0)
    signal.signal(signal.SIGCHLD, _child_ended)
    gc.disable()  # it would give back memory of the parent's GPU
    torch.set_num_threads(1)  # the parent's threads are not here
    found: tuple[Any, BaseException | None]
    try:
        found = work(), None
    except BaseException as error:
        found = None, error
    with suppress(BrokenPipeError):
        try:
            results.send(found)
        except (TypeError, ValueError, AttributeError):  # an error that cannot be pickled
            results.send((None, RuntimeError(f"{type(found[1]).__name__}: {found[1]}")))


def _child_ended(number: int, frame: object) -> None:
    """megatron-core's writer of several files waits for its processes for ever, if one of them is killed."""
    for process in list(multiprocessing.process._children):  # type: ignore[attr-defined]  # those that have ended, too
        if process.exitcode:
            raise ChildProcessError(_ended(process.exitcode))


def end_with(parent: int) -> None:
    """Have this process end with its parent."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had ended before
        os._exit(1)


def _ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"it was ended by {signal.Signals(-code).name}, as the system does where memory runs out"
    return f"it ended with code {code}"
