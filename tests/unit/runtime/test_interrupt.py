"""Ctrl-C and SIGTERM as a process of its own meets them: an exit code and a sentence, and a second one at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

from minitron_mcore.data.dataset import FIELDS, batches_once
from minitron_mcore.runtime import interrupt
from minitron_mcore.runtime.interrupt import (
    EXIT_DURATION,
    HUNG,
    HUNG_LATER,
    SIGNALS,
    Ending,
    at_once,
    held_back,
    hung_code,
    made_progress,
    sparing,
    stopped_code,
)
from minitron_mcore.training import signals
from tests.e2e.launchers import ROOT, environment

# A verb whose work is `WORK`; neither torch nor a stage is loaded.
VERB = """
import ctypes, hashlib, os, signal, subprocess, sys, threading, time
from minitron_mcore import cli

def send(number, after):
    threading.Timer(after, os.kill, (os.getpid(), number)).start()

def carry_out(options, ending):
    try:
        WORK
    finally:
        print("cleared away", flush=True)
    return 0

cli.carry_out = carry_out
sys.exit(cli.main(["inspect", "path=x"]))
"""
# In C, for half a minute, and back in Python only then: as in a collective that waits for a rank that is gone.
DEAF = 'hashlib.pbkdf2_hmac("sha256", b"a", b"b", 100_000_000)'
SENTENCE = "minitron inspect: stopped by {}; what was finished stays, and the same command goes on from there"

ALONE = {"data_parallel_rank": 0, "data_parallel_size": 1}


def run(work: str, **variables: str) -> subprocess.CompletedProcess[str]:
    code = VERB.replace("WORK", work)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [("SIGINT", 130, "Ctrl-C"), ("SIGTERM", 143, "SIGTERM"), ("SIGHUP", 129, "SIGHUP"), ("SIGUSR1", 138, "SIGUSR1")],
)
def test_the_first_unwinds(number: str, code: int, name: str) -> None:
    done = run(f"send(signal.{number}, 0.1); time.sleep(30)")
    assert (done.returncode, done.stdout) == (code, "cleared away\n")
    assert done.stderr.split("\n") == ["", SENTENCE.format(name), ""]


def test_other_ranks_say_nothing() -> None:
    done = run(
        "send(signal.SIGINT, 0.1); time.sleep(30)", RANK="1", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1"
    )
    assert (done.returncode, done.stderr) == (130, "")


def test_what_breaks_because_of_it_is_no_failure_of_its_own() -> None:
    """A rank that waits for its peers sees that they are gone."""
    work = (
        "signal.raise_signal(signal.SIGINT)\n    except BaseException: raise RuntimeError('connection closed by peer')"
    )
    done = run(work)
    assert done.returncode == 130 and "Traceback" not in done.stderr and SENTENCE.format("Ctrl-C") in done.stderr


def test_a_time_limit_after_progress_asks_for_another_start() -> None:
    """A preemption does not: SLURM sees to it, and srun ends ranks by SIGTERM when one of them has failed."""
    progress = "from minitron_mcore.runtime.interrupt import made_progress; made_progress()"
    assert run(f"{progress}; signal.raise_signal(signal.SIGUSR1)").returncode == 200
    assert run(f"{progress}; signal.raise_signal(signal.SIGTERM)").returncode == 143


def test_ranks_that_hang_after_progress_ask_for_another_start() -> None:
    assert hung_code() == HUNG == 75
    with Ending():
        assert hung_code() == HUNG
        made_progress()
        assert hung_code() == HUNG_LATER
    assert max(signal.valid_signals()) + 128 < HUNG_LATER, "of which srun gives the highest"


def test_what_a_stop_in_good_order_ends_with() -> None:
    """By hand: the shell's code. Else one that no signal has, as srun gives the highest of its tasks' codes."""
    by_hand = {signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGPIPE: 141}
    assert {number: stopped_code(number) for number in by_hand} == by_hand
    assert {stopped_code(number) for number in (signal.SIGTERM, signal.SIGUSR1, EXIT_DURATION)} == {200}
    assert max(signal.valid_signals()) + 128 < 200


SECOND = [
    (0, signal.SIGTERM, 1e9, False, False),
    (signal.SIGTERM, signal.SIGTERM, 4, False, False),  # an echo
    (signal.SIGUSR1, signal.SIGTERM, 4, False, False),
    (signal.SIGTERM, signal.SIGTERM, 6, False, True),
    (signal.SIGUSR1, signal.SIGTERM, 300, False, True),
    (signal.SIGUSR1, signal.SIGTERM, 300, True, False),  # a checkpoint is being written
    (signal.SIGTERM, signal.SIGINT, 0, True, True),
    (signal.SIGINT, signal.SIGTERM, 0, True, True),
]


@pytest.mark.parametrize(("first", "second", "later", "saves", "leaves"), SECOND)
def test_what_a_second_one_does(first: int, second: int, later: float, saves: bool, leaves: bool) -> None:
    with sparing(lambda: False), sparing(lambda: saves):
        assert at_once(first, second, later) is leaves
    assert not interrupt.is_saving()


def test_a_later_signal_is_no_echo() -> None:
    """Whatever the main thread does; ECHO is shortened, not waited for."""
    work = f"import minitron_mcore.runtime.interrupt as i; i.ECHO = -1; send(15, 0.2); send(10, 0.5); {DEAF}"
    done = run(work)
    assert done.returncode == 138 and done.stdout == "", done.stderr
    assert done.stderr == "minitron: left at once; what was saved before is whole\n"


def test_a_training_leaves_at_a_later_signal_but_not_while_it_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "ECHO", -1.0)
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    stop = signals.StopRequest()
    try:
        with sparing(lambda: True):
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGTERM)
        assert stop.reason == signal.SIGUSR1 and not seen
        signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    finally:
        stop.restore()
        signal.signal(signal.SIGTERM, before)


def test_a_time_that_is_up_asks_to_stop() -> None:
    stop = signals.StopRequest(ends_at=0.0)
    try:
        assert stop.reason == EXIT_DURATION
    finally:
        stop.restore()


@pytest.mark.parametrize("second", ["SIGINT", "SIGTERM"])
def test_a_second_one_leaves_at_once_wherever_the_process_is(second: str) -> None:
    done = run(f"send(signal.SIGINT, 0.2); send(signal.{second}, 0.5); {DEAF}")
    assert done.returncode == 130 and done.stdout == "", "it never came back from where it was"
    assert done.stderr == "minitron: left at once; what was saved before is whole\n"


def test_a_second_sigterm_is_the_first_ones_echo() -> None:
    done = run("send(signal.SIGTERM, 0.2); send(signal.SIGTERM, 0.25); time.sleep(30)")
    assert done.returncode == 143 and done.stdout == "cleared away\n"


def test_no_hangup_under_nohup() -> None:
    code = VERB.replace("WORK", "signal.raise_signal(signal.SIGHUP)")
    command = ["nohup", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "cleared away\n")


def test_a_process_started_meanwhile_goes_on() -> None:
    """As the workers of `preprocess` do, which get the terminal's Ctrl-C too."""
    with held_back():
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5); print('done')"], stdout=-1)
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=30)[0] == b"done\n" and child.returncode == 0


def test_a_reader_that_is_forked_as_ctrl_c_comes_tells_its_process_nothing() -> None:
    """Which would take it for a second Ctrl-C, and leave before it has saved."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    asked = [True]

    def interrupt() -> None:
        if asked[0]:
            signal.raise_signal(signal.SIGINT)

    os.register_at_fork(after_in_child=interrupt)
    sample = {name: torch.arange(4) for name in FIELDS}
    before = signal.set_wakeup_fd(writing), signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        batch = next(batches_once([sample], [0], micro_batch_size=1, num_workers=2, **ALONE))  # type: ignore[arg-type]
        assert batch["tokens"].tolist() == [[0, 1, 2, 3]]
        os.write(writing, b"end")
        assert signal.SIGINT not in os.read(reading, 99)
    finally:
        asked[0] = False
        signal.set_wakeup_fd(before[0])
        signal.signal(signal.SIGINT, before[1])
        os.close(reading)
        os.close(writing)


def test_handlers_come_back_and_a_forked_child_is_no_concern() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Ending() as ending:
        child = os.fork()
        if not child:
            signal.raise_signal(signal.SIGINT)  # not ours: no exception, and nothing in the parent's pipe
            signal.raise_signal(signal.SIGINT)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not ending.number
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_in_another_thread_nothing_is_taken_over() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[Any] = []

    def look() -> None:
        with Ending():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before]


def test_output_that_nobody_reads_asks_to_stop() -> None:
    """`train | tee log`: the Ctrl-C ends `tee` as well, and what is printed on the way to the checkpoint fails."""
    reading, writing = os.pipe()
    os.close(reading)
    stop = signals.StopRequest()
    try:
        with open(writing, "w", buffering=1) as stream:
            told = signals._Outliving(stream, stop)
            print("iteration 1", file=told, flush=True)  # type: ignore[call-overload]
            print("iteration 2", file=told, flush=True)  # type: ignore[call-overload]
            assert stop.number == signal.SIGPIPE
    finally:
        stop.restore()
