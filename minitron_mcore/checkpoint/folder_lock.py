"""One writer of a folder at a time: what is left of a write may be cleared away only where no write is under way."""

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
from minitron_mcore.runtime.start import Runtime

TRAINING_LOCK = "training.lock"
# What a file system says that has no locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
# A forked child shares its parent's lock: data workers that outlive a killed rank for seconds would keep it.
_held: set[IO[bytes]] = set()


def _let_go() -> None:
    for stream in _held:
        stream.close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def one_writer(folders: dict[str, Path], runtime: Runtime) -> Iterator[None]:
    """Within the `with` no other training writes into the `folders`, by the recipe's key; every rank calls. Raises
    InputError where one does already."""
    locks = [
        FolderLock(
            folder / TRAINING_LOCK,
            f"{key}={folder} is being written by another run: wait for it, or stop it, or name another folder",
        )
        for key, folder in folders.items()
    ]

    def take() -> None:
        for lock in locks:
            with writing(str(lock.file.parent)):
                lock.take()

    try:
        runtime.on_main(take)
        yield
    finally:
        for lock in locks:
            lock.release()


class FolderLock:
    """The right to write into a folder, which one process has at a time; it goes with the process, however that ends.

    Where the file system has no locks, everyone has it, and `is_sure` is False.
    """

    def __init__(self, file: Path, refusal: str) -> None:
        """`file`, empty, in the folder that is to be written, there while that is; `refusal`: what to say where another
        process has it."""
        self.file, self.refusal, self.is_sure = file, refusal, False
        self._stream: IO[bytes] | None = None
        self._made_folder = False

    def take(self) -> None:
        """Make the folder if need be. Raises InputError where another process holds the lock, and OSError."""
        folder = self.file.parent
        self._made_folder = not folder.exists()
        while self._stream is None:
            folder.mkdir(parents=True, exist_ok=True)
            self._stream = self.file.open("ab")
            try:
                fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.is_sure = True
                _held.add(self._stream)
            except BlockingIOError as error:
                self._close()
                raise InputError(self.refusal) from error
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    self._close()
                    raise
            if self.is_sure and not self._is_in_place():
                self._close()  # whoever had it took the file away before the lock was ours

    def release(self) -> None:
        """Give it back, with the file, and the folder too where that was made for it and nothing else came in."""
        if self._stream is None:
            return
        self.file.unlink(missing_ok=True)
        self._close()
        if self._made_folder:
            with suppress(OSError):
                self.file.parent.rmdir()

    def _is_in_place(self) -> bool:
        assert self._stream is not None
        held = os.fstat(self._stream.fileno())
        try:
            return os.path.samestat(held, self.file.stat())
        except FileNotFoundError:
            return False

    def _close(self) -> None:
        assert self._stream is not None
        _held.discard(self._stream)
        self._stream.close()
        self._stream, self.is_sure = None, False
