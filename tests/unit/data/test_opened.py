"""Token files that are written over while they are read are told, each time; those that are replaced are read on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from minitron_mcore.data import opened


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(opened, "_opened", {})
    for ending in (".bin", ".idx"):
        (tmp_path / f"tokens{ending}").write_bytes(b"0123")
        os.utime(tmp_path / f"tokens{ending}", ns=(1, 1))
    opened.note_opened([str(tmp_path / "tokens"), str(tmp_path / "elsewhere")])
    return str(tmp_path / "tokens")


def test_a_file_that_is_written_over_is_told_once(prefix: str) -> None:
    assert opened.written_over() == ""
    with open(prefix + ".bin", "r+b") as stream:
        stream.write(b"4567")
    told = opened.written_over()
    assert told.startswith(f"{prefix}.bin was written over while it was read: what was read since may be of both texts")
    assert opened.written_over() == ""
    os.truncate(prefix + ".bin", 2)
    os.truncate(prefix + ".idx", 2)
    assert f"{prefix}.bin and 1 more was written over" in opened.written_over()


def test_a_file_that_is_replaced_or_removed_is_read_on(prefix: str) -> None:
    Path(prefix + ".new").write_bytes(b"4567890")
    os.replace(prefix + ".new", prefix + ".bin")
    os.remove(prefix + ".idx")
    assert opened.written_over() == ""
