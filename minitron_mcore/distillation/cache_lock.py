"""One writer of a cache at a time: what is left of a write may be cleared away only where no write is under way."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from typing import IO

from minitron_mcore.errors import InputError

LOCK = "cache.lock"
# What a file system says that has no locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class FolderLock:
    """The right to write into a folder, which one process has at a time; it goes with the process, however that ends.

    Where the file system has no locks, everyone has it, and `is_sure` is False.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.is_sure = folder, False
        self._stream: IO[bytes] | None = None

    def take(self) -> None:
        """Make the folder if need be. Raises InputError where another process holds the lock, and OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stream = (self.folder / LOCK).open("ab")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.is_sure = True
        except BlockingIOError as error:
            self.release()
            raise InputError(
                f"cache.folder={self.folder} is being written by another `cache`: wait for it, or name another folder"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                self.release()
                raise

    def release(self) -> None:
        if self._stream is None:
            return
        if self.is_sure:
            # Closing alone would leave it with a child that was forked meanwhile.
            fcntl.flock(self._stream, fcntl.LOCK_UN)
        self._stream.close()
        self._stream, self.is_sure = None, False
