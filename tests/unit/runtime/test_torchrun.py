"""What is left of torchrun's report: nothing of a rank that has spoken, a line of one that a signal ended."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

from minitron_mcore.runtime import torchrun
from minitron_mcore.runtime.notice import say_failure


@pytest.mark.parametrize(
    ("codes", "expected", "said"),
    [
        ({0: 2, 1: -15}, 2, ""),
        ({1: 1, 0: 143}, 1, ""),
        ({3: -9, 0: 1}, 137, "torchrun: rank 3 was ended by SIGKILL\n"),
        ({}, 143, ""),
    ],
)
def test_the_exit_code_is_that_of_the_rank_that_failed_first(
    codes: dict[int, int], expected: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`codes` in the order in which torchrun met them; of none, because it got a signal itself."""

    def fail() -> None:
        if not codes:
            raise SignalException("", signal.SIGTERM)
        raise ChildFailedError("minitron", {rank: ProcessFailure(rank, 1, codes[rank], "") for rank in codes})

    monkeypatch.setattr(torchrun, "torchrun", fail)
    assert torchrun.main() == expected
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize(("codes", "expected"), [([200, 200], 200), ([200, 143], 138), ([200, -9], 138), ([], 138)])
def test_ranks_that_all_stopped_in_good_order_are_to_be_started_again(
    codes: list[int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a signal to torchrun itself, whose ranks end with `codes` before it is done with them."""
    handlers = {rank: SimpleNamespace(proc=SimpleNamespace(returncode=code)) for rank, code in enumerate(codes)}
    agent = torchrun.local_elastic_agent
    monkeypatch.setattr(agent, "start_processes", lambda: SimpleNamespace(subprocess_handlers=handlers))
    monkeypatch.setattr(torchrun, "_contexts", [])

    def start_and_be_warned() -> None:
        agent.start_processes()  # type: ignore[call-arg]
        signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(torchrun, "torchrun", start_and_be_warned)
    before = signal.getsignal(signal.SIGUSR1)
    try:
        assert torchrun.main() == expected
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(
    ("codes", "left", "said"),
    [
        ({1: -9}, 3, "torchrun: rank 1 was ended by SIGKILL; all ranks are started again (restart 1 of 3)\n"),
        ({0: 75}, 3, "torchrun: rank 0 has ended with exit code 75; all ranks are started again (restart 1 of 3)\n"),
        ({0: 2}, 0, ""),
        ({1: 143, 0: 1}, 0, ""),
        ({}, 3, ""),
    ],
)
def test_what_would_fail_again_is_not_started_again(
    codes: dict[int, int], left: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`codes` in the order in which torchrun met them."""
    failures = {rank: ProcessFailure(rank, 1, code, "") for rank, code in codes.items()}
    state = WorkerState.FAILED if codes else WorkerState.HEALTHY
    result = RunResult(state=state, return_values={}, failures=failures)
    monkeypatch.setattr(LocalElasticAgent, "_monitor_workers", lambda self, group: result)
    agent = torchrun.Agent.__new__(torchrun.Agent)
    agent._remaining_restarts = 3
    group: Any = SimpleNamespace(spec=SimpleNamespace(max_restarts=3))
    assert agent._monitor_workers(group) is result
    assert agent._remaining_restarts == left
    assert capsys.readouterr() == ("", said)


def test_torchruns_own_report_ends_with_the_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    say_failure("train.lr=-1 must be at least 0")
    assert capsys.readouterr().err == "train.lr=-1 must be at least 0\n"
    assert json.loads(file.read_text())["message"] == ProcessFailure(0, 1, 2, str(file)).message
    report = ChildFailedError("minitron", {0: ProcessFailure(0, 1, 2, str(file))}).format_msg()
    assert report.splitlines()[-2].endswith("train.lr=-1 must be at least 0")


def test_ranks_meet_in_a_new_store_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a quick rank finds the address of one that is gone, and fails to connect (tests/e2e/test_elastic.py)."""
    handler = DynamicRendezvousHandler.__new__(DynamicRendezvousHandler)
    before: Any = "of before"
    handler._shared_tcp_store_server = handler._bootstrap_store_info = before
    seen = []
    monkeypatch.setattr(
        LocalElasticAgent,
        "_rendezvous",
        lambda self, group: seen.append((handler._shared_tcp_store_server, handler._bootstrap_store_info)),
    )
    group = SimpleNamespace(spec=SimpleNamespace(rdzv_handler=handler))
    torchrun.Agent._rendezvous(torchrun.Agent.__new__(torchrun.Agent), group)  # type: ignore[arg-type]
    assert seen == [(None, None)]
