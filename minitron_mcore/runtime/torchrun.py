"""`python -m minitron_mcore.runtime.torchrun …` is `torchrun …`, but short about how its ranks ended, and it starts
them again only where that helps.

They have said themselves what is wrong. So this process ends with the first failed rank's exit code, and without
torchrun's log, traceback and report; only of a rank that a signal ended, which could say nothing, is there a line. A
Ctrl-C, SIGTERM or SIGUSR1, which torchrun hands on to its ranks, ends it with the shell's exit code for it, or with
that of its ranks where all were stopped in good order and are to be started again.

With `--max-restarts N` torchrun's agents start all ranks again, up to N times, when one has failed or has been given up
(watchdog.py), and a training goes on from its newest checkpoint. What would fail again is not started again: a refusal
(exit code 2), and ranks that a signal or a limit has stopped in good order.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

from torch.distributed.elastic.agent.server import local_elastic_agent
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError
from torch.distributed.launcher import api
from torch.distributed.run import main as torchrun

from minitron_mcore.runtime.interrupt import UNFINISHED, exit_code, name_of
from minitron_mcore.runtime.notice import SHORT

_contexts: list[Any] = []  # of torchrun's: the ranks that it has started, and those that it has started again

REFUSED = 2
SIGNALS = range(129, 160)  # exit codes of ranks that a signal has stopped, as a shell has them


class Agent(LocalElasticAgent):
    """Of one node: torchrun's own, which knows what not to start again, and has ranks meet in a new store each time.

    Otherwise they find in the store what those before them have left: the addresses of ranks that are gone.
    """

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        handler: Any = worker_group.spec.rdzv_handler
        for name in ("_shared_tcp_store_server", "_bootstrap_store_info"):
            if hasattr(handler, name):
                setattr(handler, name, None)  # made anew on the first node, and told to the others
        super()._rendezvous(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.is_failed() and self._remaining_restarts > 0:
            rank, failure = ChildFailedError("", result.failures).get_first_failure()
            if is_final(failure.exitcode):
                self._remaining_restarts = 0
            else:
                most = worker_group.spec.max_restarts
                turn = f"restart {most - self._remaining_restarts + 1} of {most}"
                say(f"rank {rank} {ended(failure.exitcode)}; all ranks are started again ({turn})")
        return result


def is_final(code: int) -> bool:
    """Whether ranks of which one ended with the exit code `code` would end so again, or are to stay ended."""
    return code in (REFUSED, UNFINISHED) or code in SIGNALS


def ended(code: int) -> str:
    return f"was ended by {name_of(-code)}" if code < 0 else f"has ended with exit code {code}"


def say(words: str) -> None:
    print(f"torchrun: {words}", file=sys.stderr, flush=True)


def main() -> int:
    """torchrun with this process's arguments; returns the exit code."""
    os.environ[SHORT] = "1"
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    start_processes = local_elastic_agent.start_processes

    def start_and_remember(*arguments: Any, **keywords: Any) -> Any:
        _contexts.append(start_processes(*arguments, **keywords))
        return _contexts[-1]

    local_elastic_agent.start_processes = start_and_remember
    signal.signal(signal.SIGUSR1, _hand_on)
    launcher: Any = api
    launcher.LocalElasticAgent = Agent
    try:
        torchrun()
    except SignalException as error:
        return UNFINISHED if set(_codes()) == {UNFINISHED} else exit_code(error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        say(f"rank {rank} {ended(failure.exitcode)}")
        return exit_code(-failure.exitcode)
    except RendezvousClosedError:
        say("the other nodes have given up")
        return 1
    return 0


def _hand_on(number: int, frame: FrameType | None) -> None:
    """What torchrun does of itself at SIGTERM, but not at SIGUSR1 (before 2.9 at no option)."""
    raise SignalException("", signal.Signals(number))


def _codes() -> list[int | None]:
    """The exit codes of the ranks that were started last."""
    return [handler.proc.returncode for handler in _contexts[-1].subprocess_handlers.values()] if _contexts else []


def leave(code: int) -> NoReturn:
    """End this process as it stands. While the interpreter is taken down, a thread of the rendezvous may be inside C++,
    whose end there aborts the process (seen after a Ctrl-C: exit code 134 in place of 130)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
