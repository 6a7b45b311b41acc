"""Which ranks are taken for hung, when, and what is said of them. Watchdogs of several ranks share a store in one
process; their threads are not started, so that time is what the test says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from minitron_mcore.errors import InputError
from minitron_mcore.runtime.agree import ENDS, WAITS
from minitron_mcore.runtime.config import WatchConfig
from minitron_mcore.runtime.interrupt import HUNG
from minitron_mcore.runtime.pace import timed
from minitron_mcore.runtime.progress import SILENT
from minitron_mcore.runtime.pulse import PULSE, Pulse
from minitron_mcore.runtime.watchdog import Beat, Heard, Watchdog, born, end_silent, in_words, suspected

WATCH = WatchConfig(hang_minutes=10, quiet_minutes=60)
STEP, QUIET = 600.0, 3600.0  # seconds


class Ranks:
    """Watchdogs of `size` ranks, four on a node."""

    def __init__(self, size: int) -> None:
        store = HashStore()
        self.pulses = [Pulse() for _ in range(size)]
        self.left: dict[int, int] = {}
        self.dogs = [
            Watchdog(WATCH, rank, size, 4, store, pulse=self.pulses[rank], leave=partial(self.leave, rank))
            for rank in range(size)
        ]
        for rank, (pulse, dog) in enumerate(zip(self.pulses, self.dogs, strict=True)):
            pulse.stage = "distill"
            pulse.begin(41, steady=True)
            dog._host = f"node-{rank // 4}"
        self.stopped: set[int] = set()

    def leave(self, rank: int, code: int) -> None:
        self.left[rank] = code

    def pass_by(self, seconds: float, moving: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        """Time in which the ranks `moving` go on, and those in `stopped` do not even speak."""
        for rank, dog in enumerate(self.dogs):
            if rank in moving:
                self.pulses[rank].moved += seconds
            if rank not in self.stopped and rank not in self.left:
                if dog._weigh(seconds) is not None:
                    self.left[rank] = HUNG
                dog._tell(False)
                dog.unanswered = 0.0
        for rank, dog in enumerate(self.dogs):
            if rank not in self.stopped:
                if dog.listens or dog.still > dog.limit:
                    dog._hear(seconds)
                if dog.still > dog.limit:
                    dog._judge()


def test_a_rank_that_is_stopped_is_named_by_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    ranks = Ranks(8)
    ranks.pulses[5].note("forward-compute")
    ranks.pass_by(5, set(range(8)))
    ranks.stopped = {5}
    for rank in set(range(8)) - {5}:
        ranks.pulses[rank].note("all-grads-sync")
    for _ in range(120):
        ranks.pass_by(5)
    assert capsys.readouterr().err == "", "the time is not over"
    for _ in range(3):
        ranks.pass_by(5)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == (
        "minitron distill: no rank has gone on for 605 s (watch.hang_minutes=10); rank 5 on node-1 no longer answers"
    )
    assert said[1].split() == ["rank", "host", "stage", "iteration", "last", "for"]
    stopped = ["5", "node-1", "distill", "41", "forward-compute", "610", "s", "stopped,", "dead,", "or", "out", "of"]
    assert said[2].split() == [*stopped, "reach"]
    assert said[3].split() == ["0", "node-0", "distill", "41", "all-grads-sync", "605", "s"]
    assert len(said) == 10, "once, by one rank"
    for rank in set(range(8)) - {5}:
        verdict: Any = ranks.dogs[rank].verdict
        assert verdict["ranks"] == [5] and verdict["by"] == 0
        assert [(each["rank"], each["host"]) for each in verdict["silent"]] == [(5, "node-1")]


def test_a_rank_that_works_keeps_those_that_wait_for_it() -> None:
    """For two hours the first rank prepares data, and says so by its bar."""
    ranks = Ranks(6)
    for rank, pulse in enumerate(ranks.pulses):
        pulse.steady = False
        pulse.note(WAITS if rank else "preprocess")
    for _ in range(91):
        ranks.pass_by(80, moving={0})
    assert all(dog.verdict is None for dog in ranks.dogs) and ranks.dogs[3].still == 7200 and not ranks.left
    for _ in range(50):
        ranks.pass_by(80)
    assert all(dog.verdict is not None and dog.verdict["ranks"] == [0] for dog in ranks.dogs)


def test_a_rank_that_hangs_when_the_others_are_done() -> None:
    ranks = Ranks(4)
    for rank, pulse in enumerate(ranks.pulses):
        pulse.steady = False
        pulse.note("after training" if rank == 2 else ENDS)
    for _ in range(60):
        ranks.pass_by(80)
    assert all(dog.verdict is not None and dog.verdict["ranks"] == [2] for dog in ranks.dogs)


def test_what_is_quiet_may_last_longer(capsys: pytest.CaptureFixture[str]) -> None:
    ranks = Ranks(2)
    with ranks.pulses[0].quiet("checkpoint"), ranks.pulses[1].quiet("checkpoint"):
        ranks.pass_by(1)
        ranks.pass_by(QUIET - 1)
        ranks.pass_by(1)
        assert ranks.dogs[0].verdict is None
        ranks.pass_by(1)
    assert "for 3601 s (watch.quiet_minutes=60); rank 0 on node-0 stood still first" in capsys.readouterr().err
    assert ranks.pulses[0].steady and ranks.pulses[0].doing == "after checkpoint"


@pytest.mark.parametrize("silent", [{0}, {0, 1, 4}])
def test_others_speak_where_the_first_ranks_cannot(silent: set[int], capsys: pytest.CaptureFixture[str]) -> None:
    """Those that always listen are 0, 1, and the first rank of the second node."""
    ranks = Ranks(8)
    ranks.pass_by(5, set(range(8)))
    ranks.stopped = silent
    for _ in range(140):
        ranks.pass_by(5)
    said = capsys.readouterr().err
    names = ", ".join(f"rank {rank} on node-{rank // 4}" for rank in sorted(silent))
    assert said.count("\n") == 10 and f"; {names} no longer answers" in said
    told: list[Any] = [ranks.dogs[rank].verdict for rank in range(8) if rank not in silent]
    assert all(each["ranks"] == sorted(silent) and each["by"] not in silent for each in told)


def test_a_rank_that_has_left_is_missed_by_nobody() -> None:
    ranks = Ranks(3)
    ranks.dogs[2]._tell(True)
    ranks.stopped = {2}
    for _ in range(130):
        ranks.pass_by(5)
    verdict: Any = ranks.dogs[0].verdict
    assert verdict["silent"] == [] and verdict["ranks"] in ([0], [1])


def heard(rank: int, still: float, iteration: int | None = 7, silent: float = 0.0, doing: str = "agree") -> Heard:
    return Heard(Beat(rank, f"node-{rank // 8}", 1, 1, "train", iteration, doing, still, -still, STEP, 5.0, 3), silent)


def test_who_is_suspected() -> None:
    """Who is silent; else who is behind; else who stood still first."""
    first = [heard(0, 601), heard(1, 640), heard(2, 605)]
    assert suspected(first) == [first[1]]
    behind = [heard(0, 601, 6), heard(1, 640), heard(2, 605, 6)]
    assert suspected(behind) == [behind[2]]
    silent = [heard(0, 601, 6), heard(1, 3, silent=630), heard(2, 650)]
    assert suspected(silent) == [silent[1]]
    assert suspected([]) == []


def test_many_ranks_are_told_in_groups() -> None:
    ranks = [heard(rank, 601.0, doing="all-grads-sync") for rank in range(1000)]
    ranks[70] = heard(70, 610.0, doing="forward-compute")
    lines = in_words(WATCH, ranks, suspected(ranks), [1000, 1001]).splitlines()
    assert lines[0].endswith("; rank 70 on node-8 stood still first; of 2 ranks, 1000 the first, nothing was heard")
    assert [line.split()[:2] for line in lines[2:]] == [["70", "node-8"], ["0", "and"]]
    assert lines[3].split()[1:4] == ["and", "998", "more"]


def test_the_main_thread_tells_where_it_is() -> None:
    before = PULSE.moved
    with PULSE.within("train"):
        with PULSE.training():
            PULSE.begin(3, steady=True)
            with timed(None, "optimizer"):
                assert (PULSE.stage, PULSE.iteration, PULSE.doing) == ("train", 3, "optimizer") and PULSE.moved > before
        assert (PULSE.stage, PULSE.iteration, PULSE.steady) == ("train", None, False), "what follows tells less"
        with PULSE.within("evaluate"):
            assert (PULSE.stage, PULSE.iteration, PULSE.steady) == ("evaluate", None, False)
        assert PULSE.stage == "train"
    before = PULSE.moved
    with SILENT(3, "samples", "score") as bar:
        bar.advance(1)
    assert PULSE.moved > before


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs /proc")
def test_a_silent_rank_of_this_host_is_ended() -> None:
    """Not where another process has its number by now."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"]) as sleeper:
        os.kill(sleeper.pid, signal.SIGSTOP)
        beat = heard(1, 0).beat
        beat.pid, beat.born = sleeper.pid, born(sleeper.pid) + 1
        end_silent(beat, beat.host, 0)
        beat.born -= 1
        end_silent(beat, "another", 0)
        end_silent(beat, beat.host, 1)
        assert sleeper.poll() is None
        end_silent(beat, beat.host, 0)
        assert sleeper.wait(timeout=60) == -signal.SIGKILL
    assert born(os.getpid()) > 0 and born(0) == 0


def test_a_store_that_does_not_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """As where the first rank holds it and is stopped: each of the others ends by itself, and says what it heard."""
    ranks = Ranks(3)
    ranks.pass_by(5, {0, 1, 2})
    for rank in (1, 2):
        dog = ranks.dogs[rank]
        dog.beat, dog._seen, dog.still, dog.unanswered = 0.001, ranks.pulses[rank].moved, STEP + 1, STEP
        dog._look()
    assert ranks.left == {1: HUNG, 2: HUNG}
    first, *rest = capsys.readouterr().err.split("minitron distill: rank ")[1:]
    assert first.startswith("1 on node-0 has not gone on for 601 s (iteration 41, batch-generator): the store of the")
    assert "; as it last said:\n" in first and "as it last said" not in rest[0]
    assert "rank 1 stands at:" in first and "test_a_store_that_does_not_answer" in first


def test_a_rank_that_does_not_meet_the_others_gives_up() -> None:
    """Of a first rank that is stopped torch awaits the answer for ever."""
    code = """
import time
from datetime import timedelta
from minitron_mcore.runtime import watchdog
watchdog.collective_timeout = lambda: timedelta(seconds=0.1)
with watchdog.met_in_time(3):
    pass
time.sleep(0.5)
print("met", flush=True)
with watchdog.met_in_time(3):
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 75 and done.stdout == "met\n", done
    assert "minitron: rank 3 on " in done.stderr
    assert "has not met the others for 0 minutes (3 x MINITRON_TIMEOUT_MINUTES): the first rank" in done.stderr


def test_less_time_for_what_is_quiet_is_refused() -> None:
    WatchConfig(hang_minutes=0, quiet_minutes=0)
    with pytest.raises(InputError, match="quiet_minutes=5 must be hang_minutes=10 or more"):
        WatchConfig(hang_minutes=10, quiet_minutes=5)
