"""Lines that say whose they are."""

from __future__ import annotations

import pytest

from minitron_mcore.runtime.named_lines import named_lines


def test_every_line_is_named_once_and_comes_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with named_lines("l2-h64"):
        print("one", "line", flush=True)
        print("two\n\nlines")
        print("a part", end="", flush=True)
        assert capsys.readouterr().out == "l2-h64: one line\nl2-h64: two\n\nl2-h64: lines\n"
        print(" and its end")
    print("after")
    assert capsys.readouterr().out == "l2-h64: a part and its end\nafter\n"


def test_without_a_name_lines_stay(capsys: pytest.CaptureFixture[str]) -> None:
    with named_lines(None):
        print("alone")
    assert capsys.readouterr().out == "alone\n"
