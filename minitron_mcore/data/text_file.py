"""What a text file is, by its first bytes and its name, and its text as a stream of UTF-8.

The bytes alone say how it is compressed, because names lie: a server may compress a `.jsonl` on the way, or unpack a
`.gz`. They also say how it is encoded, whether it is Parquet, and whether it is text at all; the name says
whether the text is JSON. What is not text, or is in an unknown encoding, is refused.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

from minitron_mcore.errors import InputError
from minitron_mcore.files import first_line, not_read

TEXT, JSON_LINES, JSON_LIST, PARQUET = "text", "JSON lines", "JSON list", "Parquet"

BLOCK_BYTES = 1 << 18  # read of compressed text at a time
HEAD_BYTES = 1 << 16  # read of each file to see what it is
JSON_ENDINGS = (".jsonl", ".json", ".ndjson", ".jsonlines", ".jl")
PARQUET_ENDINGS = (".parquet", ".parq", ".pq")
TABLES = {".csv": "comma", ".tsv": "tab"}

# The longest first: UTF-32's mark for little endian begins with UTF-16's. utf-8-sig is the mark that UTF-8 may have.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

# (where, bytes, what it is) of files that hold no text, or hold it in a way that is not read here.
NO_TEXT = (
    (0, b"PAR1", "a Parquet file"),
    (0, b"PARE", "an encrypted Parquet file"),
    (0, b"ARROW1", "an Arrow file"),
    (0, b"\xff\xff\xff\xff", "an Arrow stream"),
    (0, b"ORC", "an ORC file"),
    (0, b"Obj\x01", "an Avro file"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"Rar!\x1a\x07", "a RAR archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x04\x22\x4d\x18", "compressed by lz4"),
    (0, b"\xff\x06\x00\x00sNaPpY", "compressed by snappy"),
    (0, b"\x1f\x9d", "compressed by compress (.Z)"),
    (0, b"%PDF-", "a PDF document"),
    (0, b"{\\rtf", "an RTF document"),
    (0, b"\x89HDF\r\n", "an HDF5 file"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"SQLite format 3", "an SQLite database"),
)
# What is raised for damaged files; by gzip and bz2 an OSError without a number.
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError)
DAMAGE_BY_NAME = {"ZstdError", "ArrowException"}  # of modules that need not be installed
# Most letters of text in another encoding cannot be decoded; a few bad bytes do not make text that.
MOST_UNDECODABLE, FEWEST_UNDECODABLE = 0.3, 64
# A list of objects, or an object over several lines.
JSON_BEGINNING = re.compile(r'\s*(?:\[\s*)?\{\s*"(?:[^"\\\n]|\\.)*"\s*:')


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
        if not isinstance(error, DAMAGE) and DAMAGE_BY_NAME.isdisjoint(kind.__name__ for kind in type(error).__mro__):
            raise
        rule = f"is damaged or cut off ({first_line(error).rstrip('.')})"
        raise InputError("", path, rule, "make or fetch it again") from error


@dataclass(frozen=True)
class TextFile:
    """A file that can be read."""

    path: str
    form: str  # TEXT, JSON_LINES, JSON_LIST or PARQUET
    compression: Compression | None = None
    mark: bytes = b""  # the byte order mark it begins with
    encoding: str = "utf-8"
    looks_like_json: bool = False  # although it is read as text

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return os.path.getsize(self.path)

    @property
    def misnamed(self) -> str:
        """How it is read, where its name says otherwise."""
        name = without_ending(self.path).lower()
        as_named = (
            self.compression is compression_named(self.path)
            and (self.form in (JSON_LINES, JSON_LIST)) == name.endswith(JSON_ENDINGS)
            and (self.form == PARQUET) == name.endswith(PARQUET_ENDINGS)
        )
        inside = f", compressed by {self.compression.name}" if self.compression else ""
        return "" if as_named else f"is read as {self.form}{inside}, whatever its name says"


def inspect_file(path: str) -> TextFile:
    """What the file at `path` is.

    Raises InputError where it is closed, damaged at its beginning, not text, or of a kind that is not read here.
    """
    name = without_ending(path).lower()
    if table := next((word for ending, word in TABLES.items() if name.endswith(ending)), None):
        rule = f"is a table of {table}-separated values, not text"
        raise InputError("", path, rule, "write the column that holds the text to a .jsonl or .parquet file")
    with reading_text(path), open(path, "rb") as raw:
        head = raw.read(HEAD_BYTES)
        if head.startswith(b"PAR1"):
            return TextFile(path, PARQUET)
        compression = compression_of(head)
        if compression:
            raw.seek(0)
            with decompressed(raw, compression, path) as stream:
                head = stream.read(HEAD_BYTES)
    if compression is None and (named := compression_named(path)):
        rule = f"is not compressed by {named.name}, as its name says"
        raise InputError("", path, rule, "fetch it again, or rename it")
    if name.endswith(PARQUET_ENDINGS):
        raise InputError("", path, "is not a Parquet file, as its name says", "make or fetch it again")
    mark, encoding = next(((mark, name) for mark, name in BYTE_ORDER_MARKS if head.startswith(mark)), (b"", "utf-8"))
    if not mark:
        _refuse_no_text(path, head, compression)
    if encoding == "utf-8":
        _refuse_other_encoding(path, head)
    text = head[len(mark) :].decode(encoding, errors="ignore")
    form = TEXT
    if name.endswith(JSON_ENDINGS):
        form = JSON_LIST if text.lstrip().startswith("[") else JSON_LINES
    elif _is_json_lines(text, is_longer=len(head) == HEAD_BYTES):
        form = JSON_LINES
    return TextFile(path, form, compression, mark, encoding, form == TEXT and bool(JSON_BEGINNING.match(text)))


def inspect_files(paths: Iterable[str], report: Callable[[str], None]) -> list[TextFile]:
    """`inspect_file` of each, so that what cannot be read is refused before anything is.

    `report` gets a line on files that are read otherwise than their names say, or perhaps should be.
    """
    files = [inspect_file(path) for path in paths]
    hint = "is read as plain text, though it begins like JSON; name it .json to have it read as that"
    json_like = [f"{file.path} {hint}" for file in files if file.looks_like_json]
    for notes in (json_like, [f"{file.path} {file.misnamed}" for file in files if file.misnamed]):
        if notes:
            report(notes[0] + (f" (and {len(notes) - 1:,} more of the kind)" if len(notes) > 1 else ""))
    return files


def _refuse_no_text(path: str, head: bytes, compression: Compression | None) -> None:
    """Raise InputError where a text without a byte order mark begins as something else does."""
    inside = f" inside {compression.name}" if compression else ""
    for start, magic, what in NO_TEXT:
        if head.startswith(magic, start):
            raise InputError("", path, f"is {what}{inside}, not text", "unpack or convert it, or leave it out")
    if compression and (again := compression_of(head)):
        raise InputError("", path, f"is compressed twice, by {compression.name} and {again.name}", "unpack it once")


def _refuse_other_encoding(path: str, head: bytes) -> None:
    refuse_zero_bytes(path, head, 0)
    text = head.decode("utf-8", errors="replace")
    bad = text.count("\ufffd") - head.count("\ufffd".encode())
    if bad >= FEWEST_UNDECODABLE and bad > MOST_UNDECODABLE * len(text):
        rule = f"is not UTF-8, because {bad:,} of its first {len(text):,} characters cannot be decoded"
        raise InputError("", path, rule, "convert it with iconv, or leave it out")


def refuse_zero_bytes(path: str, block: bytes, start: int) -> None:
    """Raise InputError where `block`, which begins at byte `start` of the text, holds a zero byte."""
    if (zero := block.find(b"\0")) >= 0:
        rule = f"is not text in UTF-8, because its byte {start + zero:,} is zero"
        raise InputError("", path, rule, "convert it with iconv if it is UTF-16 or UTF-32, or leave it out")


def _is_json_lines(text: str, is_longer: bool) -> bool:
    """Whether the first lines are JSON objects, whatever the file's name says. `text` may be the file's beginning."""
    lines = text.split("\n")
    whole = [line for line in (lines[:-1] if is_longer else lines) if line.strip()][:2]
    if not whole:  # one long line
        return is_longer and bool(re.match(r'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*["\[{\d]', text))
    try:
        records = [json.loads(line) for line in whole]
    except (ValueError, RecursionError):
        return False
    return all(isinstance(record, dict) and record for record in records)


@contextmanager
def open_text(file: TextFile) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """(the text in UTF-8 without a byte order mark, the file as it lies on the disk, to ask how far it is read).

    Raises InputError where the file is damaged, or holds what its encoding does not know.
    """
    with reading_text(file.path), open(file.path, "rb") as raw:
        stream: IO[bytes] = decompressed(raw, file.compression, file.path) if file.compression else raw
        stream.read(len(file.mark))
        if file.encoding != "utf-8":
            stream = io.BufferedReader(Blocks(_as_utf8(stream, file)))
        yield stream, raw


def _as_utf8(stream: IO[bytes], file: TextFile) -> Iterator[bytes]:
    try:
        for text in codecs.iterdecode(iter(partial(stream.read, HEAD_BYTES), b""), file.encoding):
            yield text.encode("utf-8")
    except UnicodeDecodeError as error:
        rule = f"begins as {file.encoding.upper()} but cannot be read on as that ({error.reason})"
        raise InputError("", file.path, rule, "convert it to UTF-8, or leave it out") from error
