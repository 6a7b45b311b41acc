"""Work in a forked copy of the process: what it sees, what it gives, and how it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_mcore.runtime.background import Background


def until(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_own_child() -> None:
    """As the system does to the largest process; megatron-core's writer then waits on a queue for ever."""
    fork = multiprocessing.get_context("fork")
    queue = fork.JoinableQueue()
    queue.put(1)
    child = fork.Process(target=lambda: os.kill(os.getpid(), signal.SIGKILL))
    child.start()
    queue.join()


def raise_unpicklable() -> None:
    raise ValueError(lambda: None)


def test_it_sees_the_memory_as_it_was(tmp_path: Path) -> None:
    values, gate = torch.zeros(1000), tmp_path / "gate"

    def add_up() -> tuple[float, float]:
        until(gate.exists)
        return float(values.sum()), float(values[0])

    work = Background(add_up)
    values.fill_(1.0)
    assert work.is_running
    gate.touch()
    assert work.result() == (0.0, 0.0) and work.result() == (0.0, 0.0)
    assert not work.is_running


def test_what_it_raises_is_raised_here() -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device", "x")

    work: Background[Any] = Background(fail)
    until(lambda: not work.is_running)
    with pytest.raises(OSError, match="No space left on device") as raised:
        work.result()
    assert raised.value.errno == 28
    with pytest.raises(RuntimeError, match="ValueError"):
        Background(raise_unpicklable).result()


@pytest.mark.parametrize("dies", [lambda: os.kill(os.getpid(), signal.SIGKILL), kill_own_child])
def test_a_death_is_told(dies: Callable[[], None]) -> None:
    work = Background(dies)
    until(lambda: not work.is_running)
    with pytest.raises(ChildProcessError, match="ended by SIGKILL"):
        work.result()


def test_it_outlives_signals_and_can_be_stopped() -> None:
    work = Background(lambda: time.sleep(60))
    time.sleep(0.2)
    os.kill(work._process.pid or 0, signal.SIGTERM)
    time.sleep(0.1)
    assert work.is_running
    work.stop()
    assert not work.is_running
    with pytest.raises(ChildProcessError, match="stopped"):
        work.result()


def stay(place: Path) -> None:
    place.write_text(str(os.getpid()))
    time.sleep(60)


def fork_and_stay(folder: Path) -> None:
    """A process whose work in the background has forked another."""

    def work() -> None:
        multiprocessing.get_context("fork").Process(target=stay, args=(folder / "grandchild",)).start()
        stay(folder / "child")

    Background(work)
    time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="a process of another system does not learn of its parent's end")
def test_it_ends_with_its_parent_as_does_what_it_forked(tmp_path: Path) -> None:
    parent = multiprocessing.get_context("fork").Process(target=fork_and_stay, args=(tmp_path,))
    parent.start()
    files = [tmp_path / "child", tmp_path / "grandchild"]
    until(lambda: all(file.exists() and file.read_text() for file in files))
    parent.kill()
    parent.join()

    def is_gone(pid: str) -> bool:
        status = Path(f"/proc/{pid}/stat")
        return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"

    until(lambda: all(is_gone(file.read_text()) for file in files))
