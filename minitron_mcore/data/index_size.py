"""What Megatron's indices of the samples take, worked out before they are built. Pure.

Megatron goes through the text in a Python loop, shuffles all samples in memory and writes the indices, silently and
without a limit: a budget with some zeros too many shows only when the disk is full.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Optional

from minitron_mcore.data.blend import Blend, Bounds, parse_blend, parse_split
from minitron_mcore.data.config import DataConfig
from minitron_mcore.data.index import read_index
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
