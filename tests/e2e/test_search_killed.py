"""`minitron search` as a process that is ended, again and again: the same command goes on, and ends where a search
that nothing interrupts ends, to the last bit."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import warm
from tests.distributed.ranks import run_on_ranks
from tests.distributed.search.searching import COMMON, rows_of, weights_of
from tests.e2e.launchers import environment
from tests.e2e.verbs import run_well

NAMES = ["l3-h48-f64-q6-g2", "l3-h48-f96-q6-g2", "l4-h48-f64-q6-g2"]
# How a renamed path ends -> the signal that comes just before, and how many candidates are done by then: when the first
# one is saved for the last time, before the second one's training, within the third one's, when the winner is nearly
# there.
ENDED_AT = [
    (f"candidates/{NAMES[0]}/distilled/iter_0000004", signal.SIGTERM, 1),
    (f"candidates/{NAMES[1]}/result.json", signal.SIGKILL, 1),
    (f"candidates/{NAMES[2]}/distilled/iter_0000003", signal.SIGKILL, 2),
    ("winner/distilled", signal.SIGKILL, 3),
]


@pytest.fixture(scope="module")
def root(corpus_with_teacher: Callable[[str], Path]) -> Path:
    return corpus_with_teacher("search_killed")


def command(root: Path, output: str, *overrides: str) -> list[str]:
    grid = ["search.num_layers=[3,4]", "search.ffn_hidden_size=[64,96]", f"output=@/{output}"]
    return ["search", *(text.replace("@", str(root)) for text in [*COMMON, *grid, *overrides])]


def results_of(root: Path, output: str) -> list[dict[str, Any]]:
    return [json.loads((root / output / "candidates" / name / "result.json").read_text()) for name in NAMES]


# The quick ones: a stop in good order, and a kill within a training. The two moments between are like them.
@pytest.mark.parametrize("moments", [ENDED_AT[::2], pytest.param(ENDED_AT, marks=pytest.mark.slow)], ids=["two", "all"])
def test_killed_and_started_again(root: Path, moments: list[Any]) -> None:
    stopped = f"stopped{len(moments)}"
    finished: dict[Path, int] = {}
    for ending, number, count in moments:
        log, words = root / f"{count}.log", ["os.rename", ending, *command(root, stopped)]
        env = environment(ENDED_BY=number.name)
        process = warm.start("tests.e2e.killed_at", words, output=log, env=env)
        code, shown = process.wait(timeout=100), log.read_text()
        if number == signal.SIGTERM:
            assert code == 200 and f"SIGTERM: {NAMES[0]} is done; the same command goes on after it" in shown, shown
        else:
            assert code == -number, shown
        for done, moment in finished.items():
            assert done.stat().st_mtime_ns == moment, f"{done} was trained again"
        newest = root.glob(f"{stopped}/candidates/*/distilled/iter_0000004")
        finished = {place: place.stat().st_mtime_ns for place in newest}
        assert len(finished) == count
    shown = run_well(*command(root, stopped))
    assert ("distill:" in shown) == (len(finished) < len(NAMES)) and "held-out loss" in shown
    for done, moment in finished.items():
        assert done.stat().st_mtime_ns == moment
    run_well(*command(root, "whole"))
    assert results_of(root, stopped) == results_of(root, "whole")
    for name in NAMES:
        ours, theirs = (root / output / "candidates" / name / "distilled" for output in (stopped, "whole"))
        assert rows_of(ours) == rows_of(theirs)
    assert (root / stopped / "winner/plan.json").read_bytes() == (root / "whole/winner/plan.json").read_bytes()
    ours, theirs = (run_on_ranks(weights_of, 1, root / each / "winner/distilled", 4)[0] for each in (stopped, "whole"))
    assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in theirs)
    leftovers = [path for path in (root / stopped).rglob("*") if ".unfinished" in path.name or path.suffix == ".tmp"]
    assert leftovers == []
