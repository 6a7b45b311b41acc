"""Compressed files: which compression a file's first bytes name, and its content as a stream.

Only the bytes decide, because names lie: a server may compress a `.jsonl` on the way, or unpack a `.gz`.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from minitron_mcore.errors import InputError
from minitron_mcore.files import not_read

BLOCK_BYTES = 1 << 18


@dataclass(frozen=True)
class Compression:
    """How one format is known and read. `open`: a raw stream -> the stream of its content."""

    name: str
    magic: tuple[bytes, ...]
    endings: tuple[str, ...]  # lower case
    open: Callable[[IO[bytes]], Any]


class Blocks(io.RawIOBase):
    """Blocks of bytes, end to end, as a stream."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self.blocks, self.rest = blocks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        while not self.rest:
            if (block := next(self.blocks, None)) is None:
                return 0
            self.rest = block
        size = min(len(target), len(self.rest))
        target[:size], self.rest = self.rest[:size], self.rest[size:]
        return size


def _open_zstd(raw: IO[bytes]) -> Any:
    try:
        zstd = importlib.import_module("compression.zstd")  # of Python 3.14 on
    except ImportError:
        zstd = importlib.import_module("backports.zstd")
    # Archives made with `zstd --long` ask for a window of up to 2 GiB; the library's own limit is 128 MiB.
    return zstd.ZstdFile(raw, "rb", options={zstd.DecompressionParameter.window_log_max: 31})


def _streams(new: Callable[[], Any], raw: IO[bytes]) -> Iterator[bytes]:
    """The content of compressed streams that lie end to end, as parallel tools write them; zeros may pad each.

    Python's own files of bzip2 and xz end silently at a later stream that is damaged, and at any bytes behind the first
    that are not a stream.
    """
    engine = new()
    while True:
        block = b""
        if engine.eof:
            block = engine.unused_data.lstrip(b"\0")
            while not block:
                if not (read := raw.read(BLOCK_BYTES)):
                    return
                block = read.lstrip(b"\0")
            engine = new()
        elif engine.needs_input and not (block := raw.read(BLOCK_BYTES)):
            raise EOFError("it ends within a compressed stream")
        yield engine.decompress(block, BLOCK_BYTES)


# The frame, and the skippable frames that may stand before it.
_ZSTD_MAGIC = (b"\x28\xb5\x2f\xfd", *(bytes([low]) + b"\x2a\x4d\x18" for low in range(0x50, 0x60)))
_BZIP2_MAGIC, _XZ_MAGIC = tuple(b"BZh%d" % level for level in range(1, 10)), (b"\xfd7zXZ\x00", b"]\x00\x00")

COMPRESSIONS = (
    Compression("gzip", (b"\x1f\x8b",), (".gz", ".gzip"), lambda raw: gzip.GzipFile(fileobj=raw, mode="rb")),
    Compression("zstd", _ZSTD_MAGIC, (".zst", ".zstd"), _open_zstd),
    Compression("bzip2", _BZIP2_MAGIC, (".bz2",), lambda raw: Blocks(_streams(bz2.BZ2Decompressor, raw))),
    Compression("xz", _XZ_MAGIC, (".xz", ".lzma"), lambda raw: Blocks(_streams(lzma.LZMADecompressor, raw))),
)
ENDINGS = tuple(ending for compression in COMPRESSIONS for ending in compression.endings)


def compression_of(head: bytes) -> Compression | None:
    """The compression that a file's first bytes, 8 at least, are of; None: none that can be read."""
    return next((each for each in COMPRESSIONS if head.startswith(each.magic)), None)


def compression_named(path: str) -> Compression | None:
    """The compression that the ending of `path` names."""
    return next((each for each in COMPRESSIONS if path.lower().endswith(each.endings)), None)


def without_ending(path: str) -> str:
    """`path` less the ending of a compression: `a.JSONL.gz` -> `a.JSONL`."""
    return next((path[: -len(ending)] for ending in ENDINGS if path.lower().endswith(ending)), path)


def decompressed(raw: IO[bytes], compression: Compression, path: str) -> io.BufferedReader:
    """The content of `raw`. Raises InputError where the library for it is not installed."""
    try:
        return io.BufferedReader(compression.open(raw), BLOCK_BYTES)
    except ImportError as error:
        rule = f"is compressed by {compression.name}, which needs the package backports.zstd"
        raise InputError("", path, rule, "pip install backports.zstd") from error


@contextmanager
def reading_text(path: str) -> Iterator[None]:
    """Raise InputError, naming the file, where it cannot be read, is damaged or ends too soon within."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise not_read(path, error) from error
        # An OSError without a number is what gzip and bz2 raise; ZstdError's module need not be installed.
        if isinstance(error, EOFError | OSError | zlib.error | lzma.LZMAError) or type(error).__name__ == "ZstdError":
            raise damaged(path, error) from error
        raise


def damaged(path: str, error: Exception) -> InputError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return InputError("", path, f"is damaged or cut off ({reason})", "make or fetch it again")
