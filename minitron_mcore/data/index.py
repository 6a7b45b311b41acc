"""Megatron's .idx beside a .bin, and what its indices of the samples take, worked out before they are built. Pure.

Megatron goes through the text in a Python loop, shuffles all samples in memory and writes the indices, silently and
without a limit: a budget with some zeros too many shows only when the disk is full.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import struct
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Optional

import numpy

from minitron_mcore.data.blend import Blend, Bounds, parse_blend, parse_split
from minitron_mcore.data.config import DataConfig
from minitron_mcore.errors import InputError
from minitron_mcore.files import nearest_folder

HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the token type, sequences, document ends
# Megatron's DType, without importing it (a test compares them).
TOKEN_TYPES = {
    code: numpy.dtype(name)
    for code, name in enumerate(("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"), start=1)
}
SCAN_TOKENS = 1 << 23  # read of a file at a time, or in all where a sample of it is enough
SCAN_WINDOWS = 64


# A sample's place (two int32) and its number in the shuffled order (uint32), at least.
SAMPLE_BYTES = 12
BLENDED_BYTES = 10  # of several sources: which one (int16), and the sample's number there (int64)
DOCUMENT_BYTES = 4  # int32, in every pass
# 15T tokens at 1024 are 1.5e10 samples.
MOST_SAMPLES = 1 << 34
# So many samples take minutes to shuffle, which is refused where it can only be a mistake: no budget of 1e11 tokens is
# spent on a text that is read so often. Fewer samples may: a single batch is learnt by heart in 1e5 passes.
MANY_SAMPLES, MANY_PASSES = 100_000_000, 1_000


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
    def is_consistent(self) -> bool:
        """Whether each sequence begins where the one before ends, and the documents are all of them, in order. The
        index must be whole."""
        if not self.sequences:
            return True
        path, lengths, begins = self.prefix + ".idx", self.lengths(), 0
        offsets = numpy.memmap(path, numpy.int64, "r", HEADER.size + 4 * self.sequences, (self.sequences,))
        ends = numpy.memmap(path, numpy.int64, "r", HEADER.size + 12 * self.sequences, (self.ends,))
        for start in range(0, self.sequences, SCAN_TOKENS):
            block = slice(start, start + SCAN_TOKENS)
            after = begins + numpy.cumsum(lengths[block], dtype=numpy.int64) * self.dtype.itemsize
            if offsets[start] != begins or not numpy.array_equal(offsets[block][1:], after[:-1]):
                return False
            begins = int(after[-1])
        return bool(self.ends and not ends[0] and ends[-1] == self.sequences and numpy.all(ends[1:] >= ends[:-1]))

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


@dataclass(frozen=True)
class Wanted:
    """A dataset that is asked for."""

    samples: int
    sequence_length: int
    key: str  # where the recipe asks for that many
    value: object  # of that key
    is_validation: bool = False


def cache_folder(data: DataConfig, first: Blend) -> str:
    """Where the sample indices lie: `data.cache_path`, or beside the first prefix of the first blend."""
    return data.cache_path or os.path.join(os.path.dirname(first.prefixes[0]), "cache")


def source_of(data: DataConfig, name: str, promised: Collection[str] = ()) -> tuple[Blend, Optional[Bounds]]:
    """(token files, share of their documents; None where it is empty) that `name`, train, valid or test, is made of."""
    number = ("train", "valid", "test").index(name)
    key = "data.valid" if name == "valid" and data.valid is not None else "data.train"
    blend = parse_blend(data.valid if key == "data.valid" else data.train, key, promised)
    return blend, (parse_split(data.split) if data.valid is None else [(0.0, 1.0), (0.0, 1.0), None])[number]


def check_index_size(data: DataConfig, wanted: Sequence[Wanted], promised: Collection[str] = ()) -> None:
    """Raise InputError, naming the key, where the indices of `wanted` cannot be built in sensible time or on the disk.

    Reads the headers of the token files; files that are not there, or are none, are left to be refused by what reads
    them. Indices that lie in the cache already count as if these were theirs. Any rank calls.
    """
    folder = cache_folder(data, parse_blend(data.train, "data.train", promised))
    sizes = []
    for each in wanted:
        blend, bounds = source_of(data, "valid" if each.is_validation else "train", promised)
        share = bounds[1] - bounds[0] if bounds else 0.0
        indices = [read_index(prefix) for prefix in dict.fromkeys(blend.prefixes) if os.path.isfile(prefix + ".bin")]
        documents = sum(index.sequences for index in indices if index)
        tokens = sum(index.stored_tokens for index in indices if index)
        takes = f"takes {each.samples:,} samples of {each.sequence_length} tokens"
        if each.samples > MOST_SAMPLES:
            rule = f"{takes}, and no index holds more than {MOST_SAMPLES:,}"
            raise InputError(each.key, each.value, rule, "lower it")
        passes = each.samples * each.sequence_length / max(tokens * share, 1)
        if tokens * share and each.samples > MANY_SAMPLES and passes > MANY_PASSES:
            most = f"above {MANY_SAMPLES:,} samples at most {MANY_PASSES:,} passes are possible"
            rule = f"{takes}, {passes:,.0f} passes through {blend.key}; {most}"
            raise InputError(each.key, each.value, rule, "lower it, or give more text")
        visited = documents * each.samples * each.sequence_length / max(tokens, 1)
        of_sample = SAMPLE_BYTES + (BLENDED_BYTES if len(blend.prefixes) > 1 else 0)
        sizes.append(each.samples * of_sample + DOCUMENT_BYTES * int(visited))
    held = sum(map(os.path.getsize, glob.glob(os.path.join(glob.escape(folder), "*", "*.npy"))))
    room = shutil.disk_usage(nearest_folder(folder)).free + held
    if sum(sizes) > room:
        size, largest = max(zip(sizes, wanted, strict=True), key=lambda pair: pair[0])
        index = f"index of {size / 1e9:,.1f} GB does not fit beside the others into {folder}"
        rule = f"takes {largest.samples:,} samples, whose {index}, where {room / 1e9:,.1f} GB are free"
        remedy = "set data.cache_path to a folder with more room, or lower it"
        raise InputError(largest.key, largest.value, rule, remedy)
