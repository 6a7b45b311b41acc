"""How far long work is: on a terminal a bar under whole lines, of which nothing stays; in a file few dated lines."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from minitron_mcore.errors import InputError
from minitron_mcore.runtime.progress import chosen, progress
from tests.terminal import screen

DATED = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| "


@contextlib.contextmanager
def terminal() -> Iterator[Callable[[], str]]:
    """stdout and stderr are one; gives what has been written to it."""
    ours, theirs = pty.openpty()
    told = {name: text for name, text in os.environ.items() if name != "MINITRON_PROGRESS"}
    with (
        open(theirs, "w", buffering=1, encoding="utf-8") as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
        mock.patch.dict(os.environ, {**told, "TERM": "xterm", "COLUMNS": "100"}, clear=True),
    ):

        def written() -> str:
            stream.flush()
            text = b""
            os.set_blocking(ours, False)
            while True:
                try:
                    text += os.read(ours, 1 << 16)
                except BlockingIOError:
                    return text.decode()

        yield written
    os.close(ours)


def test_a_bar_has_rate_and_time_left_and_goes() -> None:
    with terminal() as written:
        with progress(8, "samples", "score") as bar:
            for done in range(4):
                time.sleep(0.11)
                bar.advance()
                assert bar.done == done + 1
        shown = written()
        frames = re.findall(r"\rscore: +(\d+)%\|(.*?)\| (\d)/8 samples, +(\S+) samples/s, \d\d:\d\d left", shown)
        assert [frame[2] for frame in frames] == ["0", "1", "2", "3", "4"][-len(frames) :] and len(frames) >= 4
        assert frames[-1][0] == "50" and float(frames[-1][3]) == pytest.approx(9, abs=3)
        assert all(len(line) < 100 for line in re.split("[\r\n]", shown)), "no line wraps"
        assert screen(shown) == [""]


def test_lines_come_whole_above_bars_within_bars() -> None:
    with terminal() as written:
        with progress(2, "candidates", "search") as outer:
            print("begun", flush=True)
            with progress(100_000, "B", "export") as inner:
                print("a part,", end="", flush=True)
                inner.reach(50_000)
                print("its end", file=sys.stderr)
                print(" and its end\ntwo\n", flush=True)
            time.sleep(0.11)
            outer.advance()
            print("rest", end="")
        print()
        shown = written()
        assert "50.0k/100kB" in shown and "1/2 candidates" in shown
        assert screen(shown) == ["begun", "its end", "a part, and its end", "two", "", "rest", ""]


def test_an_error_leaves_the_streams_and_no_bar() -> None:
    with terminal() as written:
        before = sys.stdout, sys.stderr
        with pytest.raises(KeyError), progress(2, "steps", "work") as bar, progress(None, "", "within"):
            bar.advance()
            raise KeyError("lost")
        assert (sys.stdout, sys.stderr) == before
        print("after")
        assert screen(written()) == ["after", ""]


def test_work_without_a_known_end_shows_its_time() -> None:
    with terminal() as written:
        with progress(None, "tokens", "reading") as bar:
            bar.advance(7)
        with progress(None, "", "training") as bar:
            bar.show()
        assert re.search(r"\rreading: 7 tokens, 00:00", (shown := written())), shown
        assert re.search(r"\rtraining: 00:00", shown)


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_a_file_gets_few_dated_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    with progress(1000, "samples", "score", style="lines") as bar:  # a second each: a line every 100 s
        for _ in range(1000):
            now += 1
            bar.advance()
    lines = lines_of(capsys)
    assert all(re.match(DATED + "score: ", line) for line in lines)
    assert [re.findall(r": (\d[\d,]*)/1,000 samples", line) for line in lines] == [
        [f"{done:,}"] for done in range(100, 1001, 100)
    ]
    assert lines[3].endswith("score: 400/1,000 samples (40%) | 1 samples/s | 0:10:00 left")
    with progress(40, "B", "export", style="lines", done=10) as bar:  # 30 s: every ten
        for _ in range(30):
            now += 1
            bar.advance()
    assert len(lines_of(capsys)) == 3
    with progress(10, "samples", "short", style="lines") as bar:
        for _ in range(9):
            now += 1
            bar.advance()
    with progress(100_000, "samples", "own", style="lines", lines=False) as bar:
        now += 50
        bar.advance(50)
    assert lines_of(capsys) == []
    with progress(100_000, "steps", "long", style="lines") as bar:  # a day and more: every five minutes
        for _ in range(900):
            now += 1
            bar.advance()
    assert len(lines_of(capsys)) == 3
    with progress(None, "", "training", style="lines") as bar:
        now += 12
        bar.show()
    (line,) = lines_of(capsys)
    assert re.fullmatch(DATED + "training: 0:00:12 so far", line)


def test_work_goes_neither_back_nor_beyond_its_end() -> None:
    with progress(10, "samples", "score", style="none") as bar:
        for done, stands in ((3, 3), (2, 3), (12, 10)):
            bar.reach(done)
            assert bar.done == stands
    with progress(10, "samples", "score", style="none", done=4) as bar:
        assert list(bar.over([1, 2], float)) == [1, 2] and bar.done == 7


def test_what_shows() -> None:
    with terminal():
        assert chosen("auto", {"TERM": "xterm"}) == chosen("auto", {"TERM": "xterm", "NO_COLOR": "1"}) == "bar"
        assert chosen("auto", {"TERM": "dumb"}) == "lines"
        assert chosen("auto", {"MINITRON_PROGRESS": "none", "TERM": "xterm"}) == "none"
        assert chosen("bar", {"MINITRON_PROGRESS": "lines"}) == "bar", (
            "a key that is given comes before the environment"
        )
        with pytest.raises(InputError, match="MINITRON_PROGRESS=always must be one of auto, bar, lines, none"):
            chosen("auto", {"MINITRON_PROGRESS": "always"})
        with Path(os.devnull).open("w") as file, contextlib.redirect_stdout(file):
            assert chosen("auto", {"TERM": "xterm"}) == "lines"
