"""A log that a training appends to. It outlives a disk that is full, read-only or away: lines wait in memory. Pure."""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress
from pathlib import Path

MOST_WAITING = 100_000  # lines; about 100 MB


class PatientFile:
    """Appends lines to a file, each at once. One that cannot be written waits for the next try, which is the next line.

    Nothing is ever raised for it: whether a training goes on without its disk is for its checkpoints to say. Of more
    than MOST_WAITING lines the oldest are lost.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError where the file cannot be opened, or made, now."""
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._waiting: deque[bytes] = deque(maxlen=MOST_WAITING)
        self._is_told = False

    def write(self, line: str) -> None:
        self._waiting.append(line.encode())
        self._catch_up()

    def _catch_up(self) -> None:
        try:
            while self._waiting:
                written = os.write(self._descriptor, self._waiting[0])
                if written < len(self._waiting[0]):  # the next try tells why
                    self._waiting[0] = self._waiting[0][written:]
                else:
                    self._waiting.popleft()
        except OSError as error:
            self._tell(error)
            self._open_again()
        else:
            if self._is_told:
                print(f"{self.path} can be written again, and has the lines that waited", flush=True)
            self._is_told = False

    def close(self) -> None:
        if self._waiting:
            self._catch_up()
        if self._waiting:
            print(f"WARNING: {self.path} lacks its last {len(self._waiting):,} lines", flush=True)
        with suppress(OSError):
            os.close(self._descriptor)

    def _tell(self, error: OSError) -> None:
        if not self._is_told:
            words = f"WARNING: {self.path} cannot be written, and its lines wait: {os.strerror(error.errno or 0)}"
            print(words, flush=True)
        self._is_told = True

    def _open_again(self) -> None:
        """A file on a disk that has come back is to be opened anew; it is not made, for another disk may lie there."""
        with suppress(OSError):
            again = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            with suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = again
