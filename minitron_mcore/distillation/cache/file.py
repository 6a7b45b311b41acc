"""What `cache` writes: a teacher's targets for the samples of a data set, compressed, in shards.

DIR/cache.json             how the targets were made, written first; whatever differs here is another cache, but for the
                           number of samples, which may grow, and where a teacher of the same weights lay
DIR/targets-000000.bin     the targets of samples 0 .. shard_samples - 1, and so on; a shard is there whole or not
DIR/cache.lock             empty; held by the one process that may write here

A shard: MAGIC; the header's length and checksum, 8 bytes each, little-endian; the header, JSON; a block a sample:

    {"settings": digest of cache.json's settings, "first": number of the first sample,
     "blocks": [[length, checksum, checksum of the sample's tokens], …]}

A block holds, for the s tokens of a sample, in zlib streams: how many ids each token has; the ids, ascending, each as
its distance from the one before; how often each was drawn (`sampled`); values (`top_k`: log-probabilities; `sampled`
with a proposal of its own: log p/q); and, in fp32, the logarithm of the probability of all other ids of each token
(`top_k` of fewer ids than there are). Numbers are split into bytes, lowest bytes first: those of a kind compress well.

Legend: s tokens of a sample, E ids of all its tokens together.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import xxhash

from minitron_mcore.errors import InputError
from minitron_mcore.files import reading, write_whole, writing

DESCRIPTION = "cache.json"
LOCK = "cache.lock"
FORMAT = 2  # 1 had no probability of the other ids, and the number of samples in the digest
MAGIC = b"MINITGT\x01"
VALUE_TYPES = {"fp16": "<f2", "fp32": "<f4"}
ANEW = "delete the folder and write it again with `cache`"
_WRITE_MISSING = "run `cache` again, which writes what is missing"
_WRITE_ANEW = f"delete it and {_WRITE_MISSING}"
_PREFIX = struct.Struct("<8sQQ")
_LENGTH = struct.Struct("<I")
_OPEN_HEADERS = 16
_NUMBER = (int, float)
# What targets cannot be read without, and of what type; by method, besides.
_SETTINGS: dict[str, Any] = dict.fromkeys(("vocab_size", "num_samples", "shard_samples"), int)
_SETTINGS |= {"temperature": _NUMBER, "dtype": str, "teacher": dict}
_OF_METHOD: dict[str, dict[str, Any]] = {"sampled": {"proposal_temperature": _NUMBER}, "top_k": {"top_k": int}}


@dataclass(frozen=True)
class Targets:
    """One sample's targets: of each of its s tokens some ids, ascending."""

    num_ids: numpy.ndarray  # int64 [s]: ids of each token
    ids: numpy.ndarray  # int64 [E]
    counts: numpy.ndarray | None = None  # int64 [E], at least 1: how often each was drawn
    values: numpy.ndarray | None = None  # fp32 [E]
    tails: numpy.ndarray | None = None  # fp32 [s]: logarithm of the probability of all other ids together


def token_checksum(tokens: numpy.ndarray) -> str:
    """Of a sample's token ids [s], int64."""
    return xxhash.xxh3_64_hexdigest(numpy.ascontiguousarray(tokens, dtype="<i8").data)


def has_tails(settings: dict[str, Any]) -> bool:
    """Whether some ids are left to a tail."""
    return settings["method"] == "top_k" and settings["top_k"] < settings["vocab_size"]


def settings_digest(settings: dict[str, Any]) -> str:
    """The same for caches whose targets of a sample are the same, however many samples and files they have."""
    said = {name: value for name, value in settings.items() if name not in ("num_samples", "shard_samples")}
    teacher = settings.get("teacher", {})
    if teacher.get("weights") is not None:
        said["teacher"] = {name: value for name, value in teacher.items() if name != "checkpoint"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def _columns(settings: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """What a block holds, in order: of each field of `Targets` the numbers' type, and how many bytes of it at most."""
    id_bytes = max(1, ((settings["vocab_size"] - 1).bit_length() + 7) // 8)  # the fewest that hold every id
    columns = {"num_ids": ("<i8", 4), "ids": ("<i8", id_bytes)}
    if settings["method"] == "sampled":
        columns["counts"] = ("<i8", 2)
    if settings["method"] == "top_k" or settings["proposal_temperature"] != 1.0:
        columns["values"] = (VALUE_TYPES[settings["dtype"]], 4)
    if has_tails(settings):
        columns["tails"] = ("<f4", 4)
    return columns


def encode_targets(targets: Targets, settings: dict[str, Any]) -> bytes:
    """A block; the settings' `dtype`, of VALUE_TYPES, is what values (but not tails) are rounded to."""
    deltas = numpy.diff(targets.ids, prepend=0)
    starts = (numpy.cumsum(targets.num_ids) - targets.num_ids)[targets.num_ids > 0]
    deltas[starts] = targets.ids[starts]
    stored = replace(targets, ids=deltas, counts=None if targets.counts is None else targets.counts - 1)
    columns = [(getattr(stored, name).astype(kind), width) for name, (kind, width) in _columns(settings).items()]
    planes = [plane for values, width in columns for plane in values[:, None].view(numpy.uint8)[:, :width].T]
    streams = [_compress(plane.tobytes()) for plane in planes]
    return b"".join([_LENGTH.pack(len(targets.num_ids)), *(_LENGTH.pack(len(s)) + s for s in streams)])


def decode_targets(block: bytes, settings: dict[str, Any]) -> Targets:
    """What `encode_targets` was given."""

    def planes() -> Iterator[numpy.ndarray]:
        place = _LENGTH.size
        while place < len(block):
            (length,) = _LENGTH.unpack_from(block, place)
            place += _LENGTH.size + length
            yield numpy.frombuffer(zlib.decompress(block[place - length : place]), numpy.uint8)

    def numbers(kind: str, width: int) -> numpy.ndarray:
        width = min(width, numpy.dtype(kind).itemsize)
        result = next(stream).astype(numpy.int64)
        for byte, plane in zip(range(1, width), stream, strict=False):
            if plane.any():
                result |= numpy.left_shift(plane, 8 * byte, dtype=numpy.int64)
        return result if kind == "<i8" else result.astype(f"<u{width}").view(kind).astype(numpy.float32)

    stream = planes()
    found = {name: numbers(*column) for name, column in _columns(settings).items()}
    num_ids = found["num_ids"]
    assert _LENGTH.unpack_from(block) == num_ids.shape
    # A running sum over all tokens, less what it had reached where the token begins.
    reached = numpy.cumsum(found["ids"])
    starts = numpy.cumsum(num_ids) - num_ids
    before = numpy.concatenate([[0], reached])[starts]
    found["ids"] = reached - numpy.repeat(before, num_ids)
    if "counts" in found:
        found["counts"] += 1
    return Targets(**found)


def _compress(content: bytes) -> bytes:
    """By how often each byte occurs, and runs of one byte: nothing else repeats in random draws, and to look for it
    makes the file up to a fifth longer."""
    stream = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    return stream.compress(content) + stream.flush()


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"targets-{shard:06d}.bin"


def write_shard(folder: Path, settings: dict[str, Any], shard: int, blocks: list[tuple[bytes, str]]) -> None:
    """Write the blocks of a shard's first samples, each with the checksum of its tokens.

    Whole or not at all. One process calls. Raises InputError.
    """
    path, first = shard_file(folder, shard), shard * settings["shard_samples"]
    rows = [[len(block), xxhash.xxh3_64_hexdigest(block), tokens] for block, tokens in blocks]
    said = {"settings": settings_digest(settings), "first": first, "blocks": rows}
    header = json.dumps(said, separators=(",", ":")).encode()
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    with writing(str(path)):
        try:
            with partial.open("wb") as stream:
                stream.write(_PREFIX.pack(MAGIC, len(header), xxhash.xxh3_64_intdigest(header)) + header)
                stream.writelines(block for block, _ in blocks)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """One process calls."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / DESCRIPTION, json.dumps({"format": FORMAT, "settings": settings}, indent=1) + "\n")


def read_settings(folder: Path) -> dict[str, Any]:
    """How a cache was made. Raises InputError if `folder` holds none that this version reads."""
    path = folder / DESCRIPTION
    with reading(f"distill.teacher=cache:{folder}"):
        if not path.is_file():
            rule, remedy = f"holds no teacher's targets: {DESCRIPTION} is missing", "write them with `cache`"
            raise InputError("distill.teacher", f"cache:{folder}", rule, f"{remedy}, or name another folder")
        text = path.read_bytes()
    try:
        content = json.loads(text.decode("utf-8"))
        found, settings = content["format"], dict(content["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damage(path, "it does not say how the targets were made") from error
    if found == 1:
        raise InputError("", path, "is of format 1, an older version's, without the probability of left-out ids", ANEW)
    if found != FORMAT:
        raise InputError("", path, f"is of format {found!r}, but this version reads format {FORMAT}", ANEW)
    method = settings.get("method")
    if method not in _OF_METHOD:
        raise _damage(path, f"its method is {method!r}, not one of {', '.join(_OF_METHOD)}")
    wanted = _SETTINGS | _OF_METHOD[method]
    require_settings(path, settings, tuple(wanted))
    for name, kind in wanted.items():
        value = settings[name]
        if not isinstance(value, kind) or (isinstance(value, (int, float)) and not value > 0):
            raise _damage(path, f"{name} cannot be {value!r}")
    require_settings(path, settings["teacher"], ("architecture",))
    if settings["dtype"] not in VALUE_TYPES:
        raise _damage(path, f"its dtype is {settings['dtype']!r}, not one of {', '.join(VALUE_TYPES)}")
    return settings


def require_settings(path: Path, settings: dict[str, Any], names: tuple[str, ...]) -> None:
    """Raise InputError if the `settings` of the file `path` lack one of `names`."""
    for name in names:
        if name not in settings:
            raise _damage(path, f"it does not say {name}")


def _damage(path: Path, what: str, remedy: str = ANEW) -> InputError:
    return InputError("", path, f"is damaged: {what}", remedy)


class _Block(NamedTuple):
    """Where the targets of a sample lie in their shard."""

    offset: int
    length: int
    checksum: str
    tokens: str  # checksum of the sample's tokens


class CacheReader:
    """The targets of a cache by sample number. Only the blocks that are asked for are read; safe in several threads."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError if `folder` holds no cache."""
        self.folder = folder
        self.settings = read_settings(folder)
        self._blocks = lru_cache(_OPEN_HEADERS)(self._read_header)

    def missing_shards(self, num_samples: int) -> list[int]:
        """Which shards do not hold their part of the first `num_samples` samples.

        Raises InputError for one that is damaged or belongs to another cache.
        """
        size = self.settings["shard_samples"]
        shards = range(-(-num_samples // size))
        return [shard for shard in shards if self.held(shard) < min(size, num_samples - shard * size)]

    def held(self, shard: int) -> int:
        """How many samples are in a shard: the last one grows with the cache. Raises InputError as `missing_shards`."""
        return len(self._blocks(shard)) if shard_file(self.folder, shard).is_file() else 0

    def stored(self, shard: int, count: int) -> list[tuple[bytes, str]]:
        """The first `count` blocks of a shard as `write_shard` takes them. Raises InputError."""
        first = shard * self.settings["shard_samples"]
        return [(self._bytes(sample), self.tokens_of(sample)) for sample in range(first, first + count)]

    def tokens_of(self, sample: int) -> str:
        """Checksum of the sample's tokens, as the teacher saw them. Raises InputError."""
        return self._block(sample).tokens

    def read(self, sample: int) -> Targets:
        """The targets of one sample. Raises InputError if they are missing or damaged."""
        return decode_targets(self._bytes(sample), self.settings)

    def _bytes(self, sample: int) -> bytes:
        shard = sample // self.settings["shard_samples"]
        path = shard_file(self.folder, shard)
        # A shard that has grown since its header was read is another file: its header is then read once more.
        for _ in range(2):
            place = self._block(sample)
            with reading(str(path), _WRITE_MISSING), path.open("rb") as stream:
                stream.seek(place.offset)
                block = stream.read(place.length)
            if xxhash.xxh3_64_hexdigest(block) == place.checksum:
                return block
            self._blocks.cache_clear()
        raise _damage(path, f"the checksum of sample {sample} differs", _WRITE_ANEW)

    def _block(self, sample: int) -> _Block:
        shard, place = divmod(sample, self.settings["shard_samples"])
        blocks = self._blocks(shard) if 0 <= sample < self.settings["num_samples"] else []
        if place >= len(blocks):
            count = self.settings["num_samples"]
            raise InputError("", self.folder, f"has no targets of sample {sample}, only of the first {count:,}")
        return blocks[place]

    def _read_header(self, shard: int) -> list[_Block]:
        path = shard_file(self.folder, shard)
        with reading(str(path), _WRITE_MISSING), path.open("rb") as stream:
            prefix = stream.read(_PREFIX.size)
            magic, length, checksum = _PREFIX.unpack(prefix) if len(prefix) == _PREFIX.size else (b"", 0, 0)
            end = os.fstat(stream.fileno()).st_size
            text = stream.read(length) if magic == MAGIC and length <= end else b""
        if xxhash.xxh3_64_intdigest(text) != checksum or not text:
            raise _damage(path, "its header has changed or is missing", _WRITE_ANEW)
        header = json.loads(text)
        size, rows, digest = self.settings["shard_samples"], header["blocks"], settings_digest(self.settings)
        if header["settings"] != digest or header["first"] != shard * size or len(rows) > size:
            rule = f"belongs to another cache than the {DESCRIPTION} beside it"
            raise InputError("", path, rule, "delete it and run `cache` again")
        blocks, offset = [], len(prefix) + length
        for row in rows:
            blocks.append(_Block(offset, *row))
            offset += blocks[-1].length
        if offset != end:
            raise _damage(path, "its length is not what its header says", _WRITE_ANEW)
        return blocks
