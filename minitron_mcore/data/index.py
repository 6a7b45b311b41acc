"""Megatron's .idx beside a .bin: how many documents of how many tokens the pair holds. Pure."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Optional

import numpy

HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the token type, sequences, document ends
# Megatron's DType, without importing it (a test compares them).
TOKEN_TYPES = {
    code: numpy.dtype(name)
    for code, name in enumerate(("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"), start=1)
}
SCAN_TOKENS = 1 << 23  # read of a file at a time, or in all where a sample of it is enough
SCAN_WINDOWS = 64


@dataclass(frozen=True)
class Index:
    """A pair of files by the .idx's header."""

    prefix: str
    dtype: Any  # numpy's, of a token
    sequences: int
    ends: int

    @property
    def is_whole(self) -> bool:
        """Behind the header: each sequence's length (int32) and offset (int64), then the documents' ends (int64)."""
        return os.path.getsize(self.prefix + ".idx") >= HEADER.size + 12 * self.sequences + 8 * self.ends

    @property
    def stored_tokens(self) -> int:
        """By the size of the .bin."""
        return os.path.getsize(self.prefix + ".bin") // self.dtype.itemsize

    def lengths(self) -> numpy.ndarray:
        """Tokens of each sequence, int32 [sequences]. The index must be whole."""
        if not self.sequences:
            return numpy.zeros(0, numpy.int32)
        return numpy.memmap(self.prefix + ".idx", numpy.int32, "r", HEADER.size, (self.sequences,))

    def largest_token(self, *, thorough: bool) -> int:
        """Of the whole file, which must not be empty, where `thorough`; else of a sample of it."""
        path = self.prefix + ".bin"
        return _largest_token(path, self.dtype, thorough, os.stat(path).st_mtime_ns, os.path.getsize(path))


def read_index(prefix: str) -> Optional[Index]:
    """None where the .idx is not there, or does not begin as one of Megatron's."""
    try:
        with open(prefix + ".idx", "rb") as stream:
            magic, version, code, sequences, ends = HEADER.unpack(stream.read(HEADER.size))
    except (OSError, struct.error):
        return None
    if magic != b"MMIDIDX\x00\x00" or version != 1 or code not in TOKEN_TYPES:
        return None
    return Index(prefix, TOKEN_TYPES[code], sequences, ends)


def digest_of(prefixes: Iterable[str]) -> str:
    """sha256 in hex of the indices: another text under the same name has another."""
    digest = hashlib.sha256()
    for prefix in dict.fromkeys(prefixes):
        with open(prefix + ".idx", "rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


@cache  # a corpus takes minutes to go through; it is asked for before anything is done, and where it is read
def _largest_token(path: str, dtype: Any, thorough: bool, changed_ns: int, size: int) -> int:
    tokens = numpy.memmap(path, dtype=dtype, mode="r")
    if thorough or len(tokens) <= SCAN_TOKENS:
        starts, width = numpy.arange(0, len(tokens), SCAN_TOKENS), SCAN_TOKENS
    else:
        width = SCAN_TOKENS // SCAN_WINDOWS
        starts = numpy.linspace(0, len(tokens) - width, SCAN_WINDOWS).astype(numpy.int64)
    return max(int(tokens[start : start + width].max()) for start in starts)
