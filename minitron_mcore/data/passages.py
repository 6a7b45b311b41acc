"""Long plain text as several documents.

Documents are what is held out and shuffled: a text corpus that is one file would be all training text, in one order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import IO

from minitron_mcore.data.compression import without_ending
from minitron_mcore.data.text_file import refuse_zero_bytes

# Of these endings a long file is a corpus; of others, such as source code, every file is one document.
PROSE_ENDINGS = ("", ".txt", ".text", ".raw", ".tokens")
LONG_BYTES, PASSAGE_BYTES = 1 << 16, 1 << 14  # what is longer is cut into passages of at most so many

BLOCK_BYTES = 1 << 20
# Where a passage may end, the best first: behind a blank line, a line, a space.
SEPARATORS = (b"\n\n", b"\n\r\n", b"\n", b"\r", b" ")


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
