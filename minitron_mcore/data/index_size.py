"""What Megatron's indices of the samples take, worked out before they are built.

Megatron goes through the text in a Python loop, shuffles all samples in memory and writes the indices, without a word
and without a bound: a budget with some zeros too many is seen by nothing but the disk that it fills.
"""

from __future__ import annotations

import glob
import os
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.datasets.indexed_dataset import DType

from minitron_mcore.data.blend import Blend, parse_blend, parse_split
from minitron_mcore.data.config import DataConfig
from minitron_mcore.errors import InputError
from minitron_mcore.files import nearest_folder

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
class Wanted:
    """A dataset that is asked for."""

    samples: int
    sequence_length: int
    key: str  # where the recipe asks for that many, with its value
    is_validation: bool = False


def check_index_size(data: DataConfig, wanted: Sequence[Wanted]) -> None:
    """Raise InputError, naming the key, where the indices of `wanted` cannot be built in sensible time or on the disk.

    Reads the headers of the token files; files that are not there, or are none, are left to be refused by what reads
    them. Indices that lie in the cache already count as if these were theirs. Any rank calls.
    """
    first = parse_blend(data.train, "data.train").prefixes[0]
    folder = data.cache_path or os.path.join(os.path.dirname(first), "cache")
    sizes = []
    for each in wanted:
        blend, share = _source(data, each)
        documents, tokens = _count(blend)
        if each.samples > MOST_SAMPLES:
            raise InputError(
                f"{each.key} takes {each.samples:,} samples of {each.sequence_length} tokens, and no index holds more "
                f"than {MOST_SAMPLES:,}: lower it"
            )
        passes = each.samples * each.sequence_length / max(tokens * share, 1)
        if tokens * share and each.samples > MANY_SAMPLES and passes > MANY_PASSES:
            raise InputError(
                f"{each.key} takes {each.samples:,} samples of {each.sequence_length} tokens, {passes:,.0f} passes "
                f"through {blend.key}: above {MANY_SAMPLES:,} samples at most {MANY_PASSES:,} passes are possible, "
                "lower it"
            )
        visited = documents * each.samples * each.sequence_length / max(tokens, 1)
        of_sample = SAMPLE_BYTES + (BLENDED_BYTES if len(blend.prefixes) > 1 else 0)
        sizes.append(each.samples * of_sample + DOCUMENT_BYTES * int(visited))
    needed, room = sum(sizes), _room(folder)
    if needed > room:
        size, most = max(zip(sizes, wanted, strict=True), key=lambda pair: pair[0])
        raise InputError(
            f"{most.key} takes {most.samples:,} samples, whose index of {_gigabytes(size)} does not fit beside the "
            f"others into {folder}, where {_gigabytes(room)} are free: set data.cache_path to a folder with more room, "
            "or lower it"
        )


def _source(data: DataConfig, wanted: Wanted) -> tuple[Blend, float]:
    """(files, share of their documents) that a dataset is made of."""
    if data.valid is not None:
        key = "valid" if wanted.is_validation else "train"
        return parse_blend(getattr(data, key), f"data.{key}"), 1.0
    share = parse_split(data.split)[1 if wanted.is_validation else 0]
    return parse_blend(data.train, "data.train"), 0.0 if share is None else share[1] - share[0]


def _count(blend: Blend) -> tuple[int, int]:
    """(documents, tokens) of all the files, by their headers and sizes; of those that are no index, none."""
    header = struct.Struct("<9sQBQQ")  # magic, version, code of the token type, sequences, document ends
    documents = tokens = 0
    for prefix in dict.fromkeys(blend.prefixes):
        try:
            with open(prefix + ".idx", "rb") as stream:
                _, _, code, sequences, _ = header.unpack(stream.read(header.size))
            tokens += os.path.getsize(prefix + ".bin") // DType.size(code)
            documents += sequences
        except (OSError, struct.error, ValueError):
            continue
    return documents, tokens


def _room(folder: str) -> int:
    """Bytes that the indices may take in `folder`, which need not be there yet."""
    held = sum(map(os.path.getsize, glob.glob(os.path.join(glob.escape(folder), "*", "*.npy"))))
    return shutil.disk_usage(nearest_folder(folder)).free + held


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
