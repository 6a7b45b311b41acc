"""Two processes that prepare the same chats at the same time."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.data.chat import prepare as prepare_module
from minitron_mcore.data.chat.prepared import load_prepared
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.runtime.folder_lock import FolderLock
from tests.unit.data.chat.test_prepare import CHATS, run, segments, write


def prepare_slowly(folder: Path, tokenizer: Tokenizer, path: Path, locks: str, says: Any, may_end: Any) -> None:
    """Tells what is reported, when it writes, and how many chats it has got in the end."""
    if locks == "without":
        FolderLock.take = FolderLock.release = lambda self: None  # type: ignore[method-assign]
    work = prepare_module._write

    def slowly(*arguments: Any) -> Any:
        says.put("writes")
        assert may_end.wait(60)
        return work(*arguments)

    prepare_module._write = slowly  # type: ignore[assignment]
    says.put(str(run(folder, tokenizer, path, report=says.put).parts["train"].units))


@pytest.mark.parametrize("locks", ["with", "without"])
def test_two_processes_at_once(locks: str, tmp_path: Path, family: Callable[[str], Tokenizer]) -> None:
    """With file locks one writes, and the other takes what it made; without, both write, and the second finds the
    first one's. A killed process's half is removed where that is sure to be one."""
    path, zephyr = write(tmp_path / "chats.jsonl", CHATS), family("zephyr")
    expected = run(tmp_path / "alone", zephyr, path)
    left = tmp_path / "out" / f"{expected.folder.name}.0.partial"
    left.mkdir(parents=True)
    fork = multiprocessing.get_context("fork")
    may_end, both = fork.Event(), [fork.Queue(), fork.Queue()]
    given = tmp_path, zephyr, path, locks
    processes = [fork.Process(target=prepare_slowly, args=(*given, says, may_end)) for says in both]
    processes[0].start()
    assert both[0].get(timeout=60) == "writes"
    processes[1].start()
    second = both[1].get(timeout=60)
    assert ("waiting for another command" in second) if locks == "with" else second == "writes"
    may_end.set()
    ends: list[list[str]] = [[], []]
    for shown, says in zip(ends, both, strict=True):
        while shown[-1:] != ["3"]:
            shown.append(says.get(timeout=60))
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(ends[0]) == 2 and len(ends[1]) == (1 if locks == "with" else 2), "who writes reports"
    assert left.exists() == (locks == "without")
    (made,) = [each for each in (tmp_path / "out").iterdir() if each != left]
    assert made.name == expected.folder.name
    assert segments(load_prepared(made).parts["train"]) == segments(expected.parts["train"])
