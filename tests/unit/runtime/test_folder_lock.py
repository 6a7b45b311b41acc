"""One writer of a folder at a time, in this process, in another, and beside children that were forked."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minitron_mcore.distillation.cache.write import cache_lock
from minitron_mcore.errors import InputError
from minitron_mcore.runtime.folder_lock import FolderLock, one_writer

SECOND = """
import sys
from pathlib import Path
from minitron_mcore.runtime.folder_lock import one_writer
from minitron_mcore.errors import InputError
try:
    with one_writer({"train.checkpoint": Path(sys.argv[1])}):
        print("taken")
except InputError as error:
    print(error)
"""


def taken_by_a_child(file: Path) -> bool:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            FolderLock(file, InputError("", "the folder", "is taken")).take()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def test_another_process_is_refused_with_one_sentence(tmp_path: Path) -> None:
    """Also after this process tried to take what it holds: a closed descriptor of the file would drop the lock."""
    folder = tmp_path / "new"
    with one_writer({"train.checkpoint": folder}):
        with pytest.raises(InputError) as caught, one_writer({"distill.checkpoint": folder}):
            pass
        assert (caught.value.key, caught.value.value) == ("distill.checkpoint", folder)
        command = [sys.executable, "-c", SECOND, str(folder)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        remedy = "wait for it, or stop it, or name another folder"
        assert said == f"train.checkpoint={folder} is being written by another run: {remedy}\n"
    assert not folder.exists(), "it was made for the lock"


def test_one_cache_at_a_time(tmp_path: Path) -> None:
    """Whichever way leads to the folder."""
    (tmp_path / "new").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "new")
    first, second = cache_lock(tmp_path / "new"), cache_lock(tmp_path / "link")
    first.take()
    assert first.is_sure
    with pytest.raises(InputError, match="is being written by another `cache`"):
        second.take()
    first.release()
    second.take()
    second.release()


def test_a_forked_child_does_not_hold_the_lock(tmp_path: Path) -> None:
    """As a reader of data whose rank was killed, which notices after some seconds; nor does a child that ends, and so
    closes the file, drop its parent's lock."""
    mine, lock = (FolderLock(tmp_path / "lock", InputError("", "the folder", "is taken")) for _ in range(2))
    reading, writing = os.pipe()
    killed = os.fork()
    if killed == 0:
        try:
            lock.take()
            if os.fork() == 0:
                os.write(writing, b"the child runs")
                time.sleep(10)
            os.read(reading, 1)
        finally:
            os._exit(0)
    os.waitpid(killed, 0)
    mine.take()
    assert mine.is_sure

    # The first child, ending, closes the file that it inherited.
    assert not taken_by_a_child(mine.file) and not taken_by_a_child(mine.file)
    mine.release()
    assert taken_by_a_child(mine.file)
