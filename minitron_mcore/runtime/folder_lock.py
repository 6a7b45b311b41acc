"""One writer of a folder at a time: leftovers of a write may be deleted only while no write is under way.

The locks are POSIX's: forked children, such as readers of data that outlive a killed rank for seconds, do not inherit
them. They belong to the process, and closing any descriptor of the file would drop them; so a file that this process
holds is refused by the list below, before it is opened again.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from minitron_mcore.errors import InputError
from minitron_mcore.files import writing
from minitron_mcore.runtime.agree import on_main

TRAINING_LOCK = "training.lock"
ANOTHER = "wait for it, or stop it, or name another folder"
# What a file system answers that has no locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_held: dict[tuple[int, int], int] = {}  # (device, inode) of a locked file -> the process that locked it


@contextmanager
def one_writer(folders: dict[str, Path]) -> Iterator[None]:
    """Within the `with` no other training writes into the `folders`, by the recipe's key; every rank calls. Raises
    InputError where one does already."""
    locks = [
        FolderLock(folder / TRAINING_LOCK, InputError(key, folder, "is being written by another run", ANOTHER))
        for key, folder in folders.items()
    ]
    with held(*locks):
        yield


@contextmanager
def held(*locks: FolderLock) -> Iterator[None]:
    """Within the `with` this run has the `locks`; every rank calls. Raises their refusals, on all ranks."""

    def take() -> None:
        for lock in locks:
            with writing(str(lock.file.parent)):
                lock.take()

    try:
        on_main(take)
        yield
    finally:
        for lock in locks:
            lock.release()


class FolderLock:
    """The right to write into a folder, which one holder has at a time; it ends with the process, however that ends.

    Where the file system has no locks, everyone has it, and `is_sure` is False.
    """

    def __init__(self, file: Path, refusal: InputError) -> None:
        """file: empty, in the folder to be written, there while that is. refusal: raised where another has it."""
        self.file, self.refusal, self.is_sure = file, refusal, False
        self._stream: IO[bytes] | None = None
        self._made_folder = False

    def take(self) -> None:
        """Make the folder if need be. Raises `refusal` where the lock is held, by this process or another, and
        OSError."""
        folder = self.file.parent
        self._made_folder = not folder.exists()
        while self._stream is None:
            folder.mkdir(parents=True, exist_ok=True)
            if _held.get(_identity(self.file)) == os.getpid():
                raise self.refusal
            try:
                stream = self.file.open("ab")
            except FileNotFoundError:
                continue  # whoever had it made the folder, and removed it
            try:
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.is_sure = True
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    stream.close()
                    raise (self.refusal if error.errno in (errno.EAGAIN, errno.EACCES) else error) from error
            locked = os.fstat(stream.fileno())
            if self.is_sure and _identity(self.file) != (locked.st_dev, locked.st_ino):
                stream.close()  # whoever had it deleted the file before the lock was ours
                self.is_sure = False
                continue
            self._stream = stream
            _held[locked.st_dev, locked.st_ino] = os.getpid()

    def release(self) -> None:
        """Give it back and delete the file, and the folder too if it was made for the lock and is empty."""
        if self._stream is None:
            return
        locked = os.fstat(self._stream.fileno())
        _held.pop((locked.st_dev, locked.st_ino), None)
        with suppress(OSError):  # of a disk that is gone or read-only: a file that nobody has open locks nothing
            self.file.unlink()
        with suppress(OSError):
            self._stream.close()
        self._stream, self.is_sure = None, False
        if self._made_folder:
            with suppress(OSError):
                self.file.parent.rmdir()


def _identity(file: Path) -> tuple[int, int]:
    """(device, inode); (0, 0) where there is no such file."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_dev, found.st_ino
