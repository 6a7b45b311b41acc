"""A file of a local checkpoint: one rank's state, with a checksum of every byte and what it belongs to. Pure.

    {"format": 1, "checksum": …, "size": …, "about": {…}}      JSON, filled up with blanks to HEADER bytes
    what torch.save writes

It is written aside and renamed. Node memory may be open to other users of the machine: a file is read only if it
belongs to this one, if it is whole, and if it asks for no class but those a state is made of.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from minitron_mcore.files import whole_file

FORMAT, HEADER = 1, 8192
_BLOCK = 1 << 24


class LocalFileError(Exception):
    """The file is not what was written: it says how."""


class _Counted:
    """A stream to write to, with checksum and size of what went through."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.digest, self.size = stream, xxhash.xxh3_128(), 0

    def write(self, block: Any) -> int:
        self.digest.update(block)
        self.size += memoryview(block).nbytes
        return self._stream.write(block)

    def flush(self) -> None:
        self._stream.flush()


def write_local(path: Path, about: dict[str, Any], state: Any) -> None:
    """Write `state`, of tensors on the host, as `path`, whole or not at all. Raises OSError."""
    import torch

    partial = Path(f"{path}.tmp")
    try:
        with whole_file(path) as partial, partial.open("wb") as stream:
            os.fchmod(stream.fileno(), 0o600)
            stream.write(b" " * HEADER)
            counted = _Counted(stream)
            torch.save(state, counted)  # type: ignore[arg-type]  # it needs no more than this
            head = {"format": FORMAT, "checksum": counted.digest.hexdigest(), "size": counted.size, "about": about}
            line = json.dumps(head).encode()
            assert len(line) < HEADER, f"{len(line)} bytes of {head}"
            stream.seek(0)
            stream.write(line)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def read_about(path: Path, *, whole: bool = True) -> dict[str, Any]:
    """What the file belongs to, once it is known to be whole. Raises LocalFileError, where it is not, and OSError.

    whole: False: its bytes are not read, but the header alone."""
    with _opened(path) as stream:
        head = _head(stream, path)
        size = os.fstat(stream.fileno()).st_size - HEADER
        if size != head["size"]:
            word = "cut off" if size < head["size"] else "longer than it was written"
            raise LocalFileError(f"{path} is {word}")
        if whole:
            digest = xxhash.xxh3_128()
            while block := stream.read(_BLOCK):
                digest.update(block)
            if digest.hexdigest() != head["checksum"]:
                raise LocalFileError(f"{path} has changed since it was written: its checksum is another")
        about: dict[str, Any] = head["about"]
        return about


def read_local(path: Path, classes: list[Any]) -> Any:
    """The state in the file, of `classes` and what torch itself admits. Raises LocalFileError and OSError."""
    import pickle

    import torch

    with _opened(path) as stream, torch.serialization.safe_globals(classes):
        _head(stream, path)
        try:
            return torch.load(stream, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise LocalFileError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _opened(path: Path) -> BinaryIO:
    """The file, which must be this user's own and no link."""
    stream = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")
    if os.fstat(stream.fileno()).st_uid != os.geteuid():
        stream.close()
        raise LocalFileError(f"{path} belongs to another user")
    return stream


def _head(stream: BinaryIO, path: Path) -> dict[str, Any]:
    try:
        head = json.loads(stream.read(HEADER))
        if head["format"] != FORMAT or not isinstance(head["about"], dict):
            raise ValueError("another format")
        return {"size": int(head["size"]), "checksum": str(head["checksum"]), "about": head["about"]}
    except (ValueError, KeyError, TypeError) as error:
        raise LocalFileError(f"{path} is damaged: its header cannot be read") from error
