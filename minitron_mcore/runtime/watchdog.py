"""Ranks that hang end the job: each says every few seconds how far its main thread is, and once no rank has gone any
further for the time that the recipe gives (section `watch`), one of them prints a table of all, and all end.

The beats lie in the store at which the ranks have met, over a connection of their own, and no collective is needed: the
main thread may stand anywhere as long as it lets other threads run, and where it does not, or where the process is
stopped or dead, its beats stop, which the others see. A rank that waits for one that works is not taken for hung, as
long as that one goes on. No two clocks are compared, and time in which a process was stopped itself does not count.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from minitron_mcore.runtime.agree import ENDS, WAITS, end_together
from minitron_mcore.runtime.config import WatchConfig
from minitron_mcore.runtime.interrupt import hung_code
from minitron_mcore.runtime.notice import say_failure
from minitron_mcore.runtime.pulse import PULSE, Pulse
from minitron_mcore.runtime.world import TIMEOUT, collective_timeout
from minitron_mcore.tables import counted, table

BEAT = 5.0  # seconds between two beats, or a tenth of the limit if that is less
MERCY = 3.0  # seconds for the ranks to end themselves
MOST_ROWS = 64  # of the table; of more ranks, those that go no further for the same reason share a row


@dataclass
class Beat:
    """What a rank says of itself. still: seconds for which its main thread has not moved; since: the time of
    the day when it last did, which orders the ranks and decides nothing; limit: how long it may stand still; every:
    seconds between two beats."""

    rank: int
    host: str
    pid: int
    born: int  # when the process was started, in the system's ticks: pids are used again
    stage: str
    iteration: int | None
    doing: str
    still: float
    since: float
    limit: float
    every: float
    number: int  # of the beat
    has_left: bool = False


@dataclass
class Heard:
    """The newest beat of a rank, and for how many seconds it has been the newest."""

    beat: Beat
    silent: float = 0.0

    @property
    def still(self) -> float:
        return self.beat.still + self.silent

    @property
    def is_silent(self) -> bool:
        return self.silent > max(4 * self.beat.every, 2.0)


@contextmanager
def watched(watch: WatchConfig, rank: int, size: int, local_size: int = 1) -> Iterator[None]:
    """Within the `with`, which every rank enters, the ranks are watched; within another one nothing is added. Who is
    done waits for the others: a rank that hangs after its last collective would have nobody left to see it."""
    if size == 1 or not watch.hang_minutes or Watchdog.running:
        yield
        return
    with met_in_time(rank):
        own = Watchdog(watch, rank, size, local_size, _connection())
    Watchdog.running = True
    own.start()
    try:
        yield
        end_together()
    finally:
        own.stop()
        Watchdog.running = False


@contextmanager
def met_in_time(rank: int) -> Iterator[None]:
    """Within, a rank meets the others; this process ends where that takes three times as long as a collective may. Of a
    first rank that is stopped just then, torch awaits the answer for ever."""
    limit = 3 * collective_timeout()

    def leave() -> None:
        minutes = limit.total_seconds() / 60
        words = f"rank {rank} on {socket.gethostname()} has not met the others for {minutes:.0f} minutes"
        say_failure(f"minitron: {words} (3 x {TIMEOUT}): the first rank is stopped, or the network is")
        os._exit(hung_code())

    timer = threading.Timer(limit.total_seconds(), leave)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _connection() -> dist.Store:
    """To the store where the ranks have met. Its calls may last, or fail, where the rank that holds it is gone."""
    world: Any = dist.distributed_c10d._get_default_store()
    turn = world.add(f"minitron/watches/{dist.get_rank()}", 1)
    store = dist.PrefixStore(f"minitron/watch/{turn}", world.clone())
    store.set_timeout(timedelta(seconds=30))
    return store


class Watchdog:
    """Of one rank: a thread that talks to the store, and one that waits for nothing and ends the process."""

    running = False  # in this process

    def __init__(
        self,
        watch: WatchConfig,
        rank: int,
        size: int,
        local_size: int,
        store: dist.Store,
        *,
        pulse: Pulse = PULSE,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        self.watch, self.rank, self.size, self.store, self.pulse, self.leave = watch, rank, size, store, pulse, leave
        self.beat = min(BEAT, 6 * watch.hang_minutes)
        # These always listen; the others do once none of these speaks. The second is not on the first one's node.
        listeners = sorted({0, 1, local_size} & set(range(size)))
        self.elders = [each for each in listeners if each < rank]
        self.listens = rank in listeners
        self.heard: dict[int, Heard] = {}
        self._hears_all = False
        self.verdict: dict[str, Any] | None = None
        # Seconds in which this process ran: without a move, of a silent store, and of standing while nobody says why.
        self.still = self.unanswered = self.untold = 0.0
        self._seen = pulse.moved
        self._number = 0
        self._host, self._born = socket.gethostname(), born(os.getpid())
        self._main = threading.main_thread().ident
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for work, name in ((self._talk, "beats"), (self._look, "watchdog"))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """This rank leaves, and is missed by nobody."""
        self._ended.set()
        self._threads[1].join()
        self._threads[0].join(timeout=2 * self.beat)  # it may wait for a store that has gone

    @property
    def limit(self) -> float:
        """Seconds for which the main thread may stand still where it is now."""
        return 60 * (self.watch.hang_minutes if self.pulse.steady else self.watch.quiet_minutes)

    def _talk(self) -> None:
        before = time.monotonic()
        while True:
            has_left = self._ended.wait(self.beat if self._number else 0)
            now = time.monotonic()
            # A process that was stopped has heard nothing meanwhile, and others may have spoken.
            passed, before = min(now - before, 2 * self.beat), now
            with suppress(RuntimeError):  # dist.DistError: the store does not answer
                self._tell(has_left)
                self.unanswered = 0.0
                if self.listens or self.still > self.limit:
                    self._hear(passed)
                if self.still > self.limit:
                    self._judge()
            if has_left:
                return

    def _tell(self, has_left: bool) -> None:
        self._number += 1
        at = self.pulse
        own = Beat(
            self.rank,
            self._host,
            os.getpid(),
            self._born,
            at.stage,
            at.iteration,
            at.doing,
            self.still,
            time.time() - (time.monotonic() - at.moved),
            self.limit,
            self.beat,
            self._number,
            has_left,
        )
        self.store.set(str(self.rank), json.dumps(asdict(own)))
        if self.still > self.limit and self.store.check(["verdict"]):
            self.verdict = json.loads(self.store.get("verdict"))

    def _hear(self, passed: float) -> None:
        """Read all beats; a rank for which others do that reads theirs alone, while they speak."""
        self._hears_all = self.listens or self._elders_are_silent()
        wanted = range(self.size) if self._hears_all else self.elders
        there = [each for each in wanted if each in self.heard or self.store.check([str(each)])]
        for each, text in zip(there, self.store.multi_get([str(each) for each in there]), strict=True):
            beat = Beat(**json.loads(text))
            old = self.heard.get(each)
            is_old = old is not None and old.beat.number == beat.number
            self.heard[each] = Heard(beat, old.silent + passed if old is not None and is_old else 0.0)

    def _judge(self) -> None:
        """What it means that this rank stands for long: either all do, or it waits for one that goes on, as it can tell
        itself or those can that speak before it."""
        if self._all_stand():
            self._decide()
        elif not (self._hears_all and self._nobody_goes_on()):
            self.untold = 0.0

    def _elders_are_silent(self) -> bool:
        return all(each in self.heard and self.heard[each].is_silent for each in self.elders)

    def _all_stand(self) -> bool:
        """Whether this rank is the one to say, and no rank goes on. One that has not been heard yet stands."""
        return self._hears_all and self._elders_are_silent() and self._nobody_goes_on()

    def _nobody_goes_on(self) -> bool:
        return all(each.beat.has_left or self._stands(each) for each in self.heard.values())

    def _stands(self, each: Heard) -> bool:
        """A silent rank may have gone on since its last beat, to what may last less long. One that began to listen late
        has not seen for how long others have been silent."""
        if each.is_silent:
            return not self.listens or each.still > min(each.beat.limit, self.limit)
        return each.still > each.beat.limit

    def _decide(self) -> None:
        """Say once, for all ranks, that the job hangs, and where each of them is."""
        if self.store.add("decided", 1) > 1:
            return
        here = [each for each in self.heard.values() if not each.beat.has_left]
        missing = sorted(set(range(self.size)) - self.heard.keys())
        suspects = suspected(here)
        say_failure(in_words(self.watch, here, suspects, missing))
        silent = [asdict(each.beat) for each in suspects if each.is_silent]
        verdict = {"ranks": [each.beat.rank for each in suspects] or [self.rank], "silent": silent}
        verdict |= {"by": self.rank, "host": self._host}
        self.store.set("verdict", json.dumps(verdict))
        self.verdict = verdict

    def _look(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(self.beat / 2):
            now = time.monotonic()
            passed, before = min(now - before, self.beat), now
            if (verdict := self._weigh(passed)) is not None:
                return self._leave(verdict)

    def _weigh(self, passed: float) -> dict[str, Any] | None:
        """Why this process ends, once so many more seconds have passed; None: it does not."""
        self.unanswered += passed
        if self._seen != self.pulse.moved:
            self._seen, self.still = self.pulse.moved, 0.0
            return None
        self.still += passed
        if self.still <= self.limit:
            self.untold = 0.0
            return None
        self.untold += passed
        if self.verdict is not None:
            return self.verdict
        # The others' stacks would say no more.
        if self.unanswered > max(3 * self.beat, self.limit / 2):
            words = "the store of the first rank, or of torchrun's first node, does not answer"
            say_failure(f"{self._where()}: {words}: it is stopped or gone, or the network is{self._last_heard()}")
            return {"ranks": [self.rank], "silent": [], "by": -1}
        if self.untold > 20 * self.beat:
            say_failure(f"{self._where()}, and nobody has said why")
            return {"ranks": [], "silent": [], "by": -1}
        return None

    def _where(self) -> str:
        at = self.pulse
        where = f"iteration {at.iteration}, " if at.iteration is not None else ""
        return (
            f"minitron {at.stage}: rank {self.rank} on {self._host} has not gone on for {self.still:.0f} s "
            f"({where}{at.doing})"
        )

    def _last_heard(self) -> str:
        """The table as it was when the store last answered, where this rank has it."""
        if not self.listens or not self.heard:
            return ""
        rows = [row(Heard(each.beat)) for each in self.heard.values()]
        return f"; as it last said:\n{as_table(rows)}"

    def _leave(self, verdict: dict[str, Any]) -> None:
        """End this process; and those of this node that do not run, and could not end themselves."""
        says = self.rank == verdict["by"]
        if says or self.rank in verdict["ranks"]:
            stack = "".join(traceback.format_stack(sys._current_frames()[self._main or 0]))
            print(f"rank {self.rank} stands at:\n{stack}", file=sys.stderr, flush=True)
        silent = [Beat(**each) for each in verdict["silent"]]
        if says:
            # A launcher ends all ranks once one has ended: those of this node can say where they stand before.
            self._ended.wait(max(2 * self.beat, MERCY))
            silent = [each.beat for each in self.heard.values() if not each.beat.has_left]
        for beat in silent:
            if says or beat.host != verdict["host"]:
                end_silent(beat, self._host, self.rank)
        self.leave(hung_code())


def suspected(here: list[Heard]) -> list[Heard]:
    """The ranks that the others wait for, as far as can be told: those that say nothing any more; else those in the
    earliest iteration that do not wait for others; of them the one that stood still first."""
    if silent := [each for each in here if each.is_silent]:
        return silent
    here = [each for each in here if each.beat.doing not in (WAITS, ENDS)] or here
    earliest = min((each.beat.iteration or 0 for each in here), default=0)
    behind = [each for each in here if (each.beat.iteration or 0) == earliest]
    return [min(behind, key=lambda each: each.beat.since)] if behind else []


def in_words(watch: WatchConfig, here: list[Heard], suspects: list[Heard], missing: list[int]) -> str:
    """The sentence and the table of all ranks."""
    first = min(here, key=lambda each: each.still)
    key = "hang_minutes" if first.beat.limit <= 60 * watch.hang_minutes else "quiet_minutes"
    given = getattr(watch, key)
    sentence = f"minitron {first.beat.stage}: no rank has gone on for {first.still:.0f} s (watch.{key}={given:g})"
    if suspects:
        names = [f"rank {each.beat.rank} on {each.beat.host}" for each in suspects[:8]]
        more = f" and {counted(len(suspects) - 8, 'other')}" if len(suspects) > 8 else ""
        what = "no longer answers" if suspects[0].is_silent else "stood still first"
        sentence = f"{sentence}; {', '.join(names)}{more} {what}"
    if missing:
        sentence = f"{sentence}; of {counted(len(missing), 'rank')}, {missing[0]} the first, nothing was heard"
    rows = [row(each) for each in sorted(here, key=lambda each: (each not in suspects, each.beat.rank))]
    if len(rows) > MOST_ROWS:
        rows = in_groups(rows, len(suspects))
    return f"{sentence}\n{as_table(rows)}"


def as_table(rows: list[list[str]]) -> str:
    header = ["rank", "host", "stage", "iteration", "last", "for", ""]
    return table(rows, header, left=(1, 2, 4, 6), indent="  ")


def row(each: Heard) -> list[str]:
    beat = each.beat
    iteration = "" if beat.iteration is None else str(beat.iteration)
    silent = "stopped, dead, or out of reach" if each.is_silent else ""
    return [str(beat.rank), beat.host, beat.stage, iteration, beat.doing, f"{each.still:.0f} s", silent]


def in_groups(rows: list[list[str]], suspects: int) -> list[list[str]]:
    """The first rows as they are, at most MOST_ROWS; the others, of ranks that do the same, together."""
    kept = rows[: min(suspects, MOST_ROWS)]
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for each in rows[len(kept) :]:
        groups.setdefault((each[2], each[3], each[4], each[6]), []).append(each)
    for same in groups.values():
        head = same[0]
        others = f" and {len(same) - 1} more" if len(same) > 1 else ""
        kept.append([f"{head[0]}{others}", *head[1:]])
    return kept


def end_silent(beat: Beat, host: str, rank: int) -> None:
    """End the process of another rank on this host that is stopped, since it cannot end itself, unless another has its
    number by now."""
    if beat.host == host and beat.rank != rank and beat.born and born(beat.pid) == beat.born:
        with suppress(OSError):
            os.kill(beat.pid, signal.SIGKILL)


def born(pid: int) -> int:
    """When a process was started, in ticks since the system was; 0: there is none, or the system does not say."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0
