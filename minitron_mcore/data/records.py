"""The documents of text files: read one after another as bytes, then made text.

A document is a plain text file or a passage of a long one, a line of a JSON lines file, an item of a list in a .json
file, or a row of a Parquet file. Whatever the size of a file, few of its documents are in memory at a time. Reading and
decoding are apart, since one process reads and many decode. Documents are what is held out and shuffled: a text corpus
that is one file would be all training text, in one order, so long plain text is several documents.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

from minitron_mcore.data.text_file import (
    JSON_LINES,
    JSON_LIST,
    PARQUET,
    TEXT,
    TextFile,
    open_text,
    reading_text,
    refuse_zero_bytes,
    without_ending,
)
from minitron_mcore.errors import InputError

BLOCK_BYTES = 1 << 20
REPLACEMENT = "\ufffd"  # of bytes that are not UTF-8
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
MOST_ITEM_CHARACTERS = 1 << 28  # of an item in a JSON list: what is longer is no list
PARQUET_ROWS = 256  # decoded at a time
MEND_JSON = "mend it or leave it out"
SET_KEYS = "name the key of the text as tokenizer.json_key or in preprocess.json_keys"
# Of these endings a long file is a corpus; of others, such as source code, every file is one document.
PROSE_ENDINGS = ("", ".txt", ".text", ".raw", ".tokens")
LONG_BYTES, PASSAGE_BYTES = 1 << 16, 1 << 14  # what is longer is cut into passages of at most so many

# Where a passage may end, the best first: behind a blank line, a line, a space.
SEPARATORS = (b"\n\n", b"\n\r\n", b"\n", b"\r", b" ")
UNITS = {TEXT: "line", JSON_LINES: "line", JSON_LIST: "item", PARQUET: "row"}


@dataclass
class Replacements:
    """How many characters were replaced, of which files, and where the first of each stands."""

    characters: int = 0
    first: dict[str, str] = field(default_factory=dict)  # path -> where its first one is: "line 3"

    def decode(self, raw: bytes, path: str, unit: str, number: int) -> str:
        """`raw` as text. Of plain text (`unit` is line) that begins in line `number` the line is counted on."""
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            line = number + raw.count(b"\n", 0, error.start)
        text = raw.decode("utf-8", errors="replace")
        # Those that were there before are bytes of UTF-8 like any others.
        self._add(text.count(REPLACEMENT) - raw.count(REPLACEMENT.encode()), path, f"{unit} {line:,}")
        return text

    def without_surrogates(self, text: str, path: str, where: str) -> str:
        """`text` that JSON spelled: half of a surrogate pair is no character, and no tokenizer accepts it."""
        text, count = LONE_SURROGATE.subn(REPLACEMENT, text)
        if count:
            self._add(count, path, where)
        return text

    def add(self, other: Replacements) -> None:
        """Those of text that comes after."""
        self.characters += other.characters
        for path, where in other.first.items():
            self.first.setdefault(path, where)

    def __str__(self) -> str:
        """A warning; empty without any."""
        if not self.characters:
            return ""
        path, where = next(iter(self.first.items()))
        count = f"{self.characters:,} (files: {len(self.first):,})"
        return f"WARNING: characters that are not UTF-8, replaced by U+FFFD: {count}, the first in {path}, {where}"

    def _add(self, count: int, path: str, where: str) -> None:
        self.characters += count
        self.first.setdefault(path, where)


@dataclass(frozen=True)
class Record:
    """One document as it lies in its file."""

    number: int  # of its line, item or row, from 1; of plain text the line it begins in
    content: tuple[bytes, ...]  # of Parquet one value for each key; else one value in all
    read: int  # bytes of the file on the disk that are read by now

    @property
    def size(self) -> int:
        return sum(map(len, self.content))


def read_records(file: TextFile, keys: Sequence[str], document_bytes: int | None = None) -> Iterator[Record]:
    """The documents of `file`, in order; of plain text as `passages` cuts it by `document_bytes`.

    Raises InputError with the file, and the place in it where there is one.
    """
    if file.form == PARQUET:
        yield from _rows(file, keys)
        return
    with open_text(file) as (stream, raw):
        if file.form == TEXT:
            found = passages(stream, file.path, document_bytes)
        elif file.form == JSON_LIST:
            found = _items(stream, file.path)
        else:
            found = ((number, line) for number, line in enumerate(stream, start=1) if line.strip())
        for number, content in found:
            yield Record(number, (content,), raw.tell())


def read_objects(file: TextFile) -> Iterator[tuple[int, bytes | dict[str, Any], int]]:
    """(number, object, bytes of the file that are read by now) of each object of `file`, which is no plain text.

    `object_of` makes an object of what lies in a JSON file. Of Parquet, what is null is left out. Raises InputError
    with the file, and the place in it where there is one.
    """
    if file.form != PARQUET:
        yield from ((record.number, record.content[0], record.read) for record in read_records(file, ()))
        return
    with _table(file) as table:
        size, rows, number = file.size, table.metadata.num_rows, 0
        for batch in table.iter_batches(batch_size=PARQUET_ROWS):
            for fields in batch.to_pylist():
                number += 1
                yield number, _without_nulls(fields), size * number // rows


def object_of(content: bytes | dict[str, Any], number: int, file: TextFile, replaced: Replacements) -> dict[str, Any]:
    """A line's, an item's or a row's object. Raises InputError with file and line."""
    if isinstance(content, dict):
        return content
    unit = UNITS[file.form]
    text = replaced.decode(content, file.path, unit, number).lstrip("\ufeff")
    fields = _fields(text, unit, f"{file.path}, {unit} {number},")
    if "\\ud" not in text.lower():
        return fields
    where = f"{unit} {number:,}"  # half of a surrogate pair, perhaps, however deep it lies
    mended: dict[str, Any] = _mended(fields, lambda value: replaced.without_surrogates(value, file.path, where))
    return mended


def texts_of(record: Record, form: str, path: str, keys: Sequence[str], replacements: Replacements) -> list[str]:
    """A document's text under each of `keys` (plain text has one). Raises InputError with file and line."""
    unit = UNITS[form]
    texts = [replacements.decode(value, path, unit, record.number) for value in record.content]
    if form in (TEXT, PARQUET):
        return texts
    where = f"{path}, {unit} {record.number},"
    fields = _fields(texts[0].lstrip("\ufeff"), unit, where)  # the mark of a file put behind another
    strings = [_string(fields, key, where) for key in keys]
    return [replacements.without_surrogates(text, path, f"{unit} {record.number:,}") for text in strings]


def passages(stream: IO[bytes], path: str, document_bytes: int | None) -> Iterator[tuple[int, bytes]]:
    """(number of its first line, text) of each document in the plain text `stream`; put together they are the text.

    document_bytes: text that is longer is cut into documents of at most so many bytes; 0: one document, however long;
    None: text longer than LONG_BYTES into PASSAGE_BYTES, in files with PROSE_ENDINGS alone.
    """
    longest = limit = document_bytes
    if document_bytes is None:
        is_prose = os.path.splitext(without_ending(path).lower())[1] in PROSE_ENDINGS
        longest, limit = (LONG_BYTES, PASSAGE_BYTES) if is_prose else (0, 0)
    rest, line, size = bytearray(), 1, 0
    while block := stream.read(BLOCK_BYTES):
        refuse_zero_bytes(path, block, size)
        size += len(block)
        rest += block
        if not longest or not limit or len(rest) <= longest:
            continue
        longest, start = limit, 0  # it is long
        while len(rest) - start > limit:
            end = _end(rest, start, limit)
            yield line, bytes(rest[start:end])
            line += rest.count(b"\n", start, end)
            start = end
        del rest[:start]
    yield line, bytes(rest)


def _end(text: bytearray, start: int, limit: int) -> int:
    """Where the passage that begins at `start` ends."""
    for separator in SEPARATORS:
        place = text.rfind(separator, start, start + limit)
        if place >= start + limit // 4:
            return place + len(separator)
    end = start + limit
    while end > start + limit - 3 and text[end] & 0xC0 == 0x80:  # not within a character
        end -= 1
    return end


def _items(stream: IO[bytes], path: str) -> Iterator[tuple[int, bytes]]:
    """Each item of a JSON list, as JSON."""
    scan = json.JSONDecoder().raw_decode
    # Bytes that are no UTF-8 pass through, to be counted where they are made text.
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    buffer, number, opened = "", 1, False
    while True:
        buffer = buffer.lstrip()
        if buffer and not opened:
            buffer, opened = buffer[1:].lstrip(), True
        if buffer.startswith("]") and opened:
            break
        end, fault = 0, "no comma or ] behind it"
        try:
            _, end = scan(buffer)
        except RecursionError as error:
            raise _too_deep(f"{path}, item {number:,},") from error
        except ValueError as error:
            fault = getattr(error, "msg", str(error))
        after = buffer[end:].lstrip()
        if end and after[:1] in (",", "]"):  # else a number may go on, or the list is broken
            yield number, buffer[:end].encode("utf-8", errors="surrogateescape")
            number, buffer = number + 1, after.removeprefix(",") if after[0] == "," else after
            continue
        block = text.read(max(BLOCK_BYTES, len(buffer)))
        if not block or len(buffer) > MOST_ITEM_CHARACTERS:
            raise InputError("", f"{path}, item {number:,} of its list,", f"is not JSON ({fault})", MEND_JSON)
        buffer += block
    if buffer[1:].strip() or text.read(BLOCK_BYTES).strip():
        rule = f"goes on after its list of {number - 1:,} items"
        raise InputError("", path, rule, "write one object a line (.jsonl)")


def _fields(line: str, unit: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        # Where the first one already fails, it may be no file of JSON lines at all.
        hint = "; a file of JSON lines has a whole object on each line" if where.endswith(" 1,") else ""
        rule = f"is not JSON ({error.msg} at column {error.colno})"
        raise InputError("", where, rule, MEND_JSON + hint) from error
    except RecursionError as error:
        raise _too_deep(where) from error
    except ValueError as error:  # a number of thousands of digits
        raise InputError("", where, f"cannot be read as JSON ({error})", MEND_JSON) from error
    if not isinstance(fields, dict):
        raise InputError("", where, f"holds a {type(fields).__name__}", f"make each {unit} an object")
    return fields


def _string(fields: dict[str, Any], key: str, where: str) -> str:
    if key not in fields:
        raise InputError("", where, f"has no key {key!r}, only {sorted(fields)}", SET_KEYS)
    if not isinstance(fields[key], str):
        rule = f"has a {key!r} of type {type(fields[key]).__name__}, not a string"
        raise InputError("", where, rule, "make it one, or leave the line out")
    return fields[key]


def _too_deep(where: str) -> InputError:
    return InputError("", where, "holds lists or objects nested too deeply to be read", "leave it out, or flatten it")


def _mended(value: Any, mend: Callable[[str], str]) -> Any:
    """A JSON value with all of its texts, keys as well, as `mend` makes them."""
    if isinstance(value, str):
        return mend(value)
    if isinstance(value, dict):
        return {mend(name): _mended(each, mend) for name, each in value.items()}
    return [_mended(each, mend) for each in value] if isinstance(value, list) else value


def _without_nulls(value: Any) -> Any:
    """A Parquet value without the fields that are null, as a struct's are that an object lacks."""
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


@contextmanager
def _table(file: TextFile) -> Iterator[Any]:
    """An open Parquet file. Raises InputError where it is damaged, or pyarrow is not installed."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        rule = "is a Parquet file, which needs the package pyarrow"
        raise InputError("", file.path, rule, "pip install 'minitron-mcore[parquet]'") from error
    with reading_text(file.path), parquet.ParquetFile(file.path) as table:
        yield table


def _rows(file: TextFile, keys: Sequence[str]) -> Iterator[Record]:
    """Rows of a Parquet file: the strings of the columns `keys`, still as bytes."""
    with _table(file) as table:
        import pyarrow

        _check_columns(table.schema_arrow, keys, file.path)
        size, rows, number = file.size, table.metadata.num_rows, 0
        for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=list(keys)):
            columns = [batch.column(key).cast(pyarrow.large_binary()).to_pylist() for key in keys]
            for values in zip(*columns, strict=True):
                number += 1
                if None in values:
                    key = keys[values.index(None)]
                    rule = f"has null as {key!r}, not a string"
                    raise InputError("", f"{file.path}, row {number},", rule, "fill it in, or leave the row out")
                yield Record(number, values, size * number // rows)


def _check_columns(schema: Any, keys: Sequence[str], path: str) -> None:
    import pyarrow.types

    for key in keys:
        if key not in schema.names:
            raise InputError("", path, f"has no column {key!r}, only {sorted(schema.names)}", SET_KEYS)
        if (count := schema.names.count(key)) > 1:
            raise InputError("", path, f"has {count} columns {key!r}", "rename or drop all but one")
        kind = schema.field(key).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not any(getattr(pyarrow.types, f"is_{name}")(kind) for name in STRING_TYPES):
            raise InputError("", path, f"has a column {key!r} of type {kind}", "make it one of strings")


STRING_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")  # pyarrow's
