"""A file of a local checkpoint is read where it is whole, this user's own, and made of what a state is made of."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_mcore.checkpoint import local_file
from minitron_mcore.checkpoint.local_file import HEADER, LocalFileError, read_about, read_local, write_local

ABOUT = {"run": "a", "iteration": 4}
STATE: dict[str, Any] = {
    "weights": torch.arange(100.0).bfloat16().view(10, 10),
    "progress": {"iteration": 4, "metrics": {}},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "iter_0000004_0_local.pt"
    write_local(path, ABOUT, STATE)
    return path


def test_what_is_read_is_what_was_written(file: Path) -> None:
    assert read_about(file) == ABOUT
    found = read_local(file, [])
    assert found["progress"] == STATE["progress"] and torch.equal(found["weights"], STATE["weights"])
    assert os.listdir(file.parent) == [file.name], "it was written aside and renamed"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("place", [0, 20, HEADER + 1, HEADER + 700, -1])
def test_one_flipped_bit_is_found(place: int, file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    try:
        about: Any = read_about(file)
    except LocalFileError as error:
        assert str(file) in str(error)
    else:
        assert about != ABOUT or place < HEADER, "in the header a flip may change what it says, not the state"
        assert place < HEADER


@pytest.mark.parametrize(("size", "words"), [(HEADER - 1, "is cut off"), (HEADER + 100, "is cut off"), (0, "damaged")])
def test_one_that_is_cut_off_is_found(size: int, words: str, file: Path) -> None:
    os.truncate(file, size)
    with pytest.raises(LocalFileError, match=words):
        read_about(file)
    with file.open("ab") as stream:
        stream.write(b"x" * 10**5)
    with pytest.raises(LocalFileError):
        read_about(file)


def test_other_users_files_and_links_are_not_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = file.with_name("link")
    link.symlink_to(file)
    with pytest.raises(OSError):
        read_about(link)
    user = os.geteuid()
    monkeypatch.setattr(local_file.os, "geteuid", lambda: user + 1)
    for read in (read_about, lambda path: read_local(path, [])):
        with pytest.raises(LocalFileError, match="belongs to another user"):
            read(file)


class Called:
    def __reduce__(self) -> Any:
        return os.mkdir, ("made by a pickle",)


def test_no_code_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_local(tmp_path / "file", ABOUT, {"progress": Called()})
    with pytest.raises(LocalFileError, match="cannot be read"):
        read_local(tmp_path / "file", [])
    assert not (tmp_path / "made by a pickle").exists()


def test_nothing_half_written_is_left(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(state: Any, stream: Any) -> None:
        stream.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    before = file.read_bytes()
    with pytest.raises(OSError, match="No space left"):
        write_local(file, {**ABOUT, "iteration": 6}, STATE)
    assert os.listdir(file.parent) == [file.name] and file.read_bytes() == before
