"""A command on its ranks, started and ended as a launcher does, with a script of what happens to it on the way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests import warm
from tests.e2e.launchers import environment, free_port

MERCY = 30.0  # seconds for the other ranks to end themselves, once one has failed: torchrun's
LINGER = 15.0  # seconds for what the ranks have started to end
Script = list[tuple[float, Callable[[], bool]]]  # seconds after the start, what is done then, and whether it met
_starting = threading.Lock()  # the server of warm processes talks to one at a time


@dataclass
class Ending:
    """How a start ended. since: seconds from the first event of the script to the end; met: whether each met the run;
    forced: ranks that did not end by themselves; hung: the time was up; left: processes that the ranks left behind;
    spoke: seconds after the start when the first rank said its first and its last word."""

    codes: list[int]
    since: float
    met: list[bool]
    forced: list[int] = field(default_factory=list)
    hung: bool = False
    left: int = 0
    spoke: tuple[float, float] = (0.0, 0.0)

    @property
    def ended_well(self) -> bool:
        return not any(self.codes)


class Start:
    """`words` on `ranks` ranks; rank R prints into `log`.R. Each is `module` with `words`."""

    def __init__(
        self, words: list[str], ranks: int, log: Path, *, module: str = "minitron_mcore", **variables: str
    ) -> None:
        self.logs = [log.with_name(f"{log.name}.{rank}") for rank in range(ranks)]
        world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MINITRON_TIMEOUT_MINUTES": "1"}
        with _starting:
            world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()} if ranks > 1 else {}
            self.processes = [
                warm.start(
                    module,
                    words,
                    output=self.logs[rank],
                    env=environment(**world, RANK=str(rank), LOCAL_RANK=str(rank), **variables),
                )
                for rank in range(ranks)
            ]
        self.began = time.monotonic()

    def signal(self, number: int, rank: int) -> bool:
        """To one rank, or to all where `rank` is negative; whether one was there."""
        there = [each for each in ([self.processes[rank]] if rank >= 0 else self.processes) if each.poll() is None]
        for each in there:
            with suppress(ProcessLookupError):
                os.kill(each.pid, number)
        return bool(there)

    def finish(self, limit: float, script: Script | None = None) -> Ending:
        """To the end, at most `limit` seconds after the last event of the script. A rank that fails ends the others."""
        script, met, first, told, forced, hung = [*(script or [])], [], None, None, set[int](), False
        last, said, spoke = time.monotonic(), 0, [0.0, 0.0]
        while any(each.poll() is None for each in self.processes):
            now = time.monotonic()
            if script and now - self.began >= script[0][0]:
                first, last = first or now, now
                met.append(script.pop(0)[1]())
                continue
            if told is None and any(each.poll() for each in self.processes):
                told = now
                self.signal(signal.SIGTERM, -1)
            if (told is not None and now > told + MERCY) or now > last + limit:
                hung = told is None or now > last + limit
                forced = {rank for rank, each in enumerate(self.processes) if each.poll() is None}
                self.signal(signal.SIGKILL, -1)
                [each.wait(MERCY) for each in self.processes]
            if (size := self.logs[0].stat().st_size) > said:
                said, spoke = size, [spoke[0] or now - self.began, now - self.began]
            time.sleep(0.004)
        ended = time.monotonic()
        left = self._left_behind()
        codes = [each.wait(0) for each in self.processes]
        met += [False] * len(script)
        return Ending(codes, ended - (first or self.began), met, sorted(forced), hung, left, (spoke[0], spoke[1]))

    def _left_behind(self) -> int:
        """Of what the ranks have started, how many processes do not end by themselves; they are ended."""
        sessions, deadline = {each.pid for each in self.processes}, time.monotonic() + LINGER
        while (left := members(sessions)) and time.monotonic() < deadline:
            time.sleep(0.02)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(left)

    def shown(self, rank: int = 0) -> str:
        return self.logs[rank].read_text(errors="replace")

    def told(self) -> str:
        """What the first rank said last."""
        lines = [line for line in self.shown().splitlines() if line.strip()]
        words = [line for line in lines if line.startswith("minitron ")]
        return (words or lines or ["nothing"])[-1]


def members(sessions: set[int]) -> list[int]:
    """The processes of the sessions that still run."""
    return [pid for pid, _, session in running() if session in sessions]


def descendants(pids: set[int]) -> list[int]:
    """The processes that these, or those, have started, whatever their session."""
    found, parents = set(pids), {pid: parent for pid, parent, _ in running()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - pids)


def running() -> list[tuple[int, int, int]]:
    """(process, its parent, its session) of all."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            state, parent, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if state != "Z":
                found.append((int(path.parent.name), int(parent), int(session)))
    return found
