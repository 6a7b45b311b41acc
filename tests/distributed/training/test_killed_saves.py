"""`kill -9` of a rank at a random moment of a save, again and again: what was finished stays, the newest checkpoint is
whole, and the run that goes on from it ends as one that nobody kills, to the last bit.

A moment is a touch of a file of the save, by the rank or by the process that writes for it, or so many seconds after
one. Other ranks go on for up to a second, then they end, as under a launcher.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_mcore.checkpoint.folder import finished_iterations, iteration_folder, latest_iteration
from minitron_mcore.checkpoint.integrity import verify_checkpoint
from tests.distributed.models import LAYOUTS, assemble, tiny
from tests.distributed.ranks import RankError, run_on_ranks
from tests.distributed.training.test_resume import STEPS, fit_on_rank

PATH_AT = {"open": 0, "os.rename": 1, "os.mkdir": 0, "os.remove": 0, "os.rmdir": 0, "shutil.rmtree": 0, "os.symlink": 1}
OF_A_SAVE = re.compile(r"iter_|latest_|\.best|lineage|recipe")
KEEP = 2
# Touches of a save: of the first rank, of another.
TOUCHES = (40, 2)
Moment = tuple[int, int, float]  # rank, how many touches, seconds after the last of them
_armed: list[tuple[str, int, int, float]] = []  # folder, process, touches to go, seconds
_touches = [0]
_timers: list[threading.Timer] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _armed or event not in PATH_AT:
        return
    if event == "open" and not (set(arguments[1] or "") & set("wax+") or arguments[2] & (os.O_WRONLY | os.O_RDWR)):
        return
    folder, process, count, seconds = _armed[0]
    path = arguments[PATH_AT[event]]
    path = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
    if not (path.startswith(folder) and OF_A_SAVE.search(path.removeprefix(folder))):
        return
    _touches[0] += 1
    if _touches[0] == count:
        if seconds:
            _timers.append(threading.Timer(seconds, os.kill, (process, signal.SIGKILL)))
            _timers[-1].start()
        else:
            os.kill(process, signal.SIGKILL)


def killed_on_rank(
    parallel: dict[str, Any], world_size: int, folder: str, is_async: bool, moment: Moment | None
) -> Any:
    """`fit`, until the rank of the moment is killed."""
    if moment is not None and moment[0] == int(os.environ["RANK"]):
        sys.addaudithook(_watch)
        _touches[0] = 0
        _armed[:] = [(f"{folder}/", os.getpid(), *moment[1:])]
    try:
        keys: dict[str, Any] = {"async_save": is_async, "keep_last": KEEP}
        return fit_on_rank(parallel, world_size, folder, save_interval=1, **keys)
    finally:
        _armed.clear()
        for timer in _timers:  # of a moment after the last save
            timer.cancel()
            timer.join()
        _timers.clear()


def logged(folder: Path) -> dict[int, tuple[float, float]]:
    """By iteration, of the newest time that it was done; a killed run may leave half a line."""
    lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1] if (folder / "metrics.jsonl").exists() else []
    return {row["iteration"]: (row["lm loss"], row["grad-norm"]) for row in map(json.loads, lines)}


def check(folder: Path, before: int | None, expected: dict[int, Any]) -> int | None:
    """What a killed run must leave, where `before` was the newest checkpoint when it began: the newest now."""
    newest = latest_iteration(folder) if folder.exists() else None
    finished = finished_iterations(folder)
    assert newest == (finished[-1] if finished else None)
    for iteration in finished:
        assert verify_checkpoint(iteration_folder(folder, iteration)).faults == []
    if before is not None:
        newer = [iteration for iteration in finished if iteration > before]
        assert before in finished or len(newer) >= KEEP, f"{before} was finished, and only {finished} are there"
    assert all(row == expected[iteration] for iteration, row in logged(folder).items())
    return newest


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("layout", "is_async", "kills", "seed"),
    [("1", True, 2, 1), ("DP2", False, 9, 2), ("DP2", True, 9, 3), ("TP2", False, 9, 4), ("TP2", True, 9, 5)],
)
def test_killed_while_saving(layout: str, is_async: bool, kills: int, seed: int, tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[layout]

    def start(folder: Path, moment: Moment | None) -> list[Any]:
        how = parallel, world_size, str(folder), is_async, moment
        return run_on_ranks(killed_on_rank, world_size, *how, timeout=600.0)

    def weights(ranks: list[Any]) -> dict[Any, torch.Tensor]:
        return assemble([rank["weights"] for rank in ranks], tiny("llama"))

    whole = start(tmp_path / "whole", None)
    history, expected = whole[0]["history"], weights(whole)
    assert sorted(history) == list(range(1, STEPS + 1))

    draw, killed, number, newest = random.Random(seed), 0, 0, None
    folder = tmp_path / "killed-0"
    for _ in range(4 * kills):
        if killed == kills:
            break
        rank = draw.randrange(world_size)
        moment = rank, draw.randint(1, TOUCHES[rank > 0]), draw.choice((0.0, draw.uniform(0, 0.05)))
        try:
            start(folder, moment)
        except RankError as error:
            assert "exit code" in str(error), error  # another rank may have failed first, for lack of this one
            killed += 1
        newest = check(folder, newest, history)
        when = f"rank {rank}, touch {moment[1]} + {moment[2]:.3f} s"
        print(f"seed {seed}, {when}: {killed} killed so far, newest {newest}", flush=True)
        if newest == STEPS:
            number, newest = number + 1, None
            folder = tmp_path / f"killed-{number}"
    assert killed == kills
    for each in range(number + 1):
        ranks = start(tmp_path / f"killed-{each}", None)
        assert ranks[0]["history"] == history
        for name, value in weights(ranks).items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=str(name))
        assert not list((tmp_path / f"killed-{each}").glob(".unfinished*"))
