"""Blends of token files: what a recipe names, whether it is there, whole, enough, and made by this tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from minitron_mcore.data.agreement import difference
from minitron_mcore.data.tokenizer import Tokenizer, load_tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.files import refuse_closed
from minitron_mcore.runtime.notice import warn

Bounds = tuple[float, float]  # of a share of a file's documents, each in [0, 1]

SCAN_TOKENS = 1 << 23  # of each file without a description, read to see whether the tokenizer fits
SCAN_WINDOWS = 64


@dataclass(frozen=True)
class Blend:
    """Token files, and how often each is drawn from; without weights, by their token counts."""

    prefixes: tuple[str, ...]
    weights: Optional[tuple[float, ...]]
    key: str  # where the recipe names them


@dataclass(frozen=True)
class Part:
    """One dataset to be built: a share of a blend's documents, and the number of samples asked of it."""

    name: str  # train, valid or test
    blend: Blend
    share: Bounds
    size: Optional[int]  # None: one pass
    one_pass: bool = False  # refuse to draw the same sample twice
    sequence_length: Optional[int] = None  # None: data.sequence_length
    is_asked_for: bool = True  # else left out where there is not enough of it


@dataclass(frozen=True)
class Facts:
    """What the files say about the parts to be built."""

    digest: str  # of all the indices: another text under the same name has another
    tokens: tuple[Optional[tuple[int, ...]], ...]  # for each part, of each prefix: those in the share; None: too few


def parse_blend(value: Any, key: str) -> Blend:
    """A prefix, a list of prefixes, or weights and prefixes in turn (a list, or one string). Raises InputError."""
    if value is None:
        raise InputError(f"{key} is not set; give the prefix of a .bin/.idx pair, or a blend of several")
    if isinstance(value, str):
        items = [value] if os.path.exists(value + ".idx") else value.split()
    elif isinstance(value, Sequence):
        items = [str(item).strip() for item in value]
    else:
        raise InputError(f"{key}={value!r} must be a prefix, or a list of prefixes, or of weights and prefixes")
    numbers = [_number(item) for item in items]
    if items and not any(number is not None for number in numbers):
        return Blend(tuple(map(_strip_ending, items)), None, key)
    weights, prefixes = numbers[::2], items[1::2]
    is_alternating = None not in weights and all(number is None for number in numbers[1::2])
    if not items or len(items) % 2 or not is_alternating:
        raise InputError(f"{key}={value!r} must be prefixes alone, or a weight before each prefix")
    if not all(weight is not None and math.isfinite(weight) and weight > 0 for weight in weights):
        raise InputError(f"{key}={value!r}: every weight must be a number above 0")
    return Blend(tuple(map(_strip_ending, prefixes)), tuple(w for w in weights if w is not None), key)


def parse_split(split: str) -> list[Optional[Bounds]]:
    """`969,30,1` to the bounds of train, valid and test among the documents; None where a share is empty."""
    shares = [_number(item.strip()) for item in str(split).split(",")]
    if not 1 <= len(shares) <= 3 or any(share is None or not 0 <= share < math.inf for share in shares):
        raise InputError(f"data.split={split!r} must be one to three shares of at least 0, such as 969,30,1")
    values = [share or 0.0 for share in shares] + [0.0] * (3 - len(shares))
    if not sum(values):
        raise InputError(f"data.split={split!r} must have a share above 0")
    bounds: list[Optional[Bounds]] = []
    for i, value in enumerate(values):
        bounds.append((sum(values[:i]) / sum(values), sum(values[: i + 1]) / sum(values)) if value else None)
    return bounds


def inspect_parts(
    parts: Sequence[Part], tokenizer: Tokenizer, *, sequence_length: int, thorough: bool
) -> Optional[Facts]:
    """Raise InputError unless every part can be built; the Facts where `thorough`, else only that files exist.

    One rank looks thoroughly, since that reads whole indices; the others need only see that the files are there for
    them too.
    """
    prefixes = list(dict.fromkeys((part.blend.key, prefix) for part in parts for prefix in part.blend.prefixes))
    for part in parts:
        check_prefixes(part.blend)
    if not thorough:
        return None
    digest = hashlib.sha256()
    datasets: dict[str, IndexedDataset] = {}
    for key, prefix in prefixes:
        if prefix in datasets:
            continue
        datasets[prefix] = _open(prefix, key)
        _check_tokenizer(datasets[prefix], prefix, tokenizer, key)
        with open(prefix + ".idx", "rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    tokens = tuple(_count_share(part, datasets, part.sequence_length or sequence_length) for part in parts)
    return Facts(digest.hexdigest(), tokens)


def _count_share(part: Part, datasets: dict[str, IndexedDataset], sequence_length: int) -> Optional[tuple[int, ...]]:
    """Tokens in the part's share of each prefix; None where they are too few for one that nobody asked for."""
    counts = []
    for prefix in part.blend.prefixes:
        lengths = datasets[prefix].sequence_lengths
        begin, end = (round(bound * len(lengths)) for bound in part.share)
        counts.append(int(lengths[begin:end].sum(dtype=numpy.int64)))
        if counts[-1] <= sequence_length and not part.is_asked_for:
            return None
        _check_enough(part, prefix, counts[-1], end - begin, len(lengths), sequence_length)
    return tuple(counts)


def check_prefixes(blend: Blend) -> None:
    """Raise InputError where files of a blend are not there, or closed to this user."""
    for prefix in blend.prefixes:
        _check_exists(prefix, blend.key)


def source_names(prefixes: Sequence[str]) -> list[str]:
    """What sources are called in metrics: their files' names, with as many folders as tell them apart."""
    parts = [os.path.normpath(prefix).split(os.sep) for prefix in prefixes]
    depth = 1
    while len({tuple(path[-depth:]) for path in parts}) < len(parts) and depth < max(map(len, parts)):
        depth += 1
    return [os.sep.join(path[-depth:]) for path in parts]


def surplus(blend: Blend, size: int) -> float:
    """How many more samples than its weight says each file prepares: a blend's rounding may ask for a few more."""
    return max(0.005, len(blend.prefixes) / max(size, 1))


def _number(item: str) -> Optional[float]:
    try:
        return float(item)
    except ValueError:
        return None


def _strip_ending(prefix: str) -> str:
    return prefix[:-4] if prefix.endswith((".bin", ".idx")) else prefix


def _check_exists(prefix: str, key: str) -> None:
    for ending in (".idx", ".bin"):
        refuse_closed(f"{key}: {prefix}{ending}", prefix + ending)
    if os.path.isfile(prefix + ".idx") and os.path.isfile(prefix + ".bin"):
        return
    longer = prefix + "_text_document"
    hint = f"; did you mean {longer}?" if os.path.isfile(longer + ".idx") else "; write them with the verb preprocess"
    raise InputError(f"{key}: {prefix}.bin and {prefix}.idx are not both there{hint}")


def _open(prefix: str, key: str) -> IndexedDataset:
    if not _is_whole_index(prefix + ".idx"):  # Megatron's reader would fail in ways that depend on where it was cut
        raise InputError(f"{key}: {prefix}.idx is no Megatron index, or a cut off one; preprocess the text again")
    if not os.path.getsize(prefix + ".bin"):
        raise InputError(f"{key}: {prefix}.bin is empty; preprocess the text again")
    dataset = IndexedDataset(prefix)
    expected = int(dataset.sequence_lengths.sum(dtype=numpy.int64)) * numpy.dtype(dataset.index.dtype).itemsize
    if os.path.getsize(prefix + ".bin") != expected:
        raise InputError(
            f"{key}: {prefix}.bin has {os.path.getsize(prefix + '.bin'):,} bytes where its index says {expected:,}; "
            "preprocess the text again"
        )
    return dataset


def _is_whole_index(path: str) -> bool:
    """Header, then for each sequence its length (int32) and offset (int64), then the documents' ends (int64)."""
    header = struct.Struct("<9sQBQQ")  # magic, version, code of the token type, sequences, document ends
    with open(path, "rb") as stream:
        content = stream.read(header.size)
    if len(content) < header.size:
        return False
    magic, version, code, sequences, document_ends = header.unpack(content)
    is_index = magic == b"MMIDIDX\x00\x00" and version == 1 and code in {kind.value for kind in DType}
    return is_index and os.path.getsize(path) >= header.size + 12 * sequences + 8 * document_ends


def _check_tokenizer(dataset: IndexedDataset, prefix: str, tokenizer: Tokenizer, key: str) -> None:
    rows = tokenizer.vocab_size if tokenizer.rows is None else tokenizer.rows
    try:
        with open(prefix + ".json", encoding="utf-8") as stream:
            made_by = json.load(stream)["tokenizer"]
            fingerprint, model = made_by["fingerprint"], made_by["model"]
    except (OSError, ValueError, KeyError, TypeError):  # data from elsewhere: only the ids can tell
        largest = _largest_token(prefix + ".bin", dataset.index.dtype, thorough=tokenizer.rows is not None)
        if largest >= rows:
            raise InputError(
                f"{key}: {prefix} holds token {largest}, beyond the {rows} of "
                f"tokenizer.model={tokenizer.path}; give the tokenizer that made it, or preprocess again"
            ) from None
        return
    if not tokenizer.is_named_by(fingerprint) and not _is_alike(prefix, tokenizer, model, fingerprint, rows):
        raise InputError(
            f"{key}: {prefix} was made with another tokenizer ({model}, {fingerprint[:12]}) than "
            f"tokenizer.model={tokenizer.path} ({tokenizer.fingerprint[:12]}); give that one, or preprocess again "
            "(allow=[other_tokenizer] takes its ids as they are)"
        )
    if tokenizer.rows is None and not tokenizer.stands_in:
        return
    # A few ids are in no text but by name: every token is looked at.
    if (largest := _largest_token(prefix + ".bin", dataset.index.dtype, thorough=True)) >= rows:
        raise InputError(f"{key}: {dataclasses.replace(tokenizer, rows=rows).beyond(largest)}, and {prefix} holds it")


def _is_alike(prefix: str, tokenizer: Tokenizer, model: str, fingerprint: str, rows: int) -> bool:
    """Whether the tokenizer `model`, if it still is the one of `fingerprint`, agrees below `rows`."""
    try:
        other = load_tokenizer(model)
    except InputError:
        return False
    if not other.is_named_by(fingerprint) or difference(tokenizer, other, rows) is not None:
        return False
    ends = "" if other.eos == tokenizer.eos else f", but ends documents with id {other.eos}, not {tokenizer.eos}"
    warn(f"{prefix} was made with another tokenizer ({model}) than {tokenizer.path}, of the same ids{ends}")
    return True


def _largest_token(path: str, dtype: Any, *, thorough: bool) -> int:
    tokens = numpy.memmap(path, dtype=dtype, mode="r")
    if thorough:
        blocks = range(0, len(tokens), SCAN_TOKENS)
        return max((int(tokens[start : start + SCAN_TOKENS].max()) for start in blocks), default=0)
    if len(tokens) <= SCAN_TOKENS:
        return int(tokens.max())
    width = SCAN_TOKENS // SCAN_WINDOWS
    starts = numpy.linspace(0, len(tokens) - width, SCAN_WINDOWS).astype(numpy.int64)
    return max(int(tokens[start : start + width].max()) for start in starts)


def _check_enough(part: Part, prefix: str, tokens: int, documents: int, total: int, sequence_length: int) -> None:
    """Megatron would look for samples in an empty share for ever."""
    if tokens <= sequence_length:
        raise InputError(
            f"{part.blend.key}: {prefix} holds {tokens:,} tokens in the {documents:,} of its {total:,} documents that "
            f"are for {part.name}, but one sample takes data.sequence_length + 1 = {sequence_length + 1:,}; give more "
            f"text{' (data.valid, or preprocess.valid_fraction)' if part.name == 'valid' else ''}, or lower it"
        )
    if not part.one_pass or part.size is None or part.blend.weights is None:
        return
    weight = part.blend.weights[part.blend.prefixes.index(prefix)] / sum(part.blend.weights)
    needed = math.ceil(math.ceil(part.size * weight) * (1 + surplus(part.blend, part.size)))
    if needed > (tokens - 1) // sequence_length:
        raise InputError(
            f"{part.blend.key}: {prefix} has {(tokens - 1) // sequence_length:,} different samples, too few for its "
            f"part ({needed:,}) of {part.size:,}; ask for fewer samples, or lower its weight"
        )
