"""Columns line up, and Markdown has a rule below its header."""

from __future__ import annotations

from minitron_mcore.tables import markdown, table

ROWS = [("layers", 1234, "yes"), ("h", 5, "")]


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert table(ROWS, ("axis", "n", "kept")).splitlines() == [
        "axis       n  kept",
        "layers  1234   yes",
        "h          5",
    ]
    assert table(ROWS, left=(0, 2), indent="  ").splitlines() == ["  layers  1234  yes", "  h          5"]


def test_markdown() -> None:
    assert markdown([("a", 1)], ("", "n")) == "| | n |\n|---|---|\n| a | 1 |"
