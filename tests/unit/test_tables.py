"""Columns line up, and Markdown has a rule below its header."""

from __future__ import annotations

from minitron_mcore.tables import counted, markdown, table

ROWS = [("layers", 1234, "yes"), ("h", 5, "")]


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert table(ROWS, ("axis", "n", "kept")).splitlines() == [
        "axis       n  kept",
        "layers  1234   yes",
        "h          5",
    ]
    assert table(ROWS, left=(0, 2), indent="  ").splitlines() == ["  layers  1234  yes", "  h          5"]


def test_counts_agree_with_their_words() -> None:
    told = [counted(number, what) for what in ("GPU", "microbatch", "epoch") for number in (1, 2000)]
    assert told == ["1 GPU", "2,000 GPUs", "1 microbatch", "2,000 microbatches", "1 epoch", "2,000 epochs"]


def test_markdown() -> None:
    assert markdown([("a", 1)], ("", "n")) == "| | n |\n|---|---|\n| a | 1 |"
