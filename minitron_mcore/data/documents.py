"""Documents of token files, each whole, for what is counted document by document."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TypeVar

import numpy

from minitron_mcore.data.described import Part
from minitron_mcore.data.index import read_index

T = TypeVar("T")


def draw(found: Iterable[T], most: int, seed: int) -> list[T]:
    """`most` of them, or all where there are fewer, in their order; one pass, without keeping them all."""
    generator, kept = random.Random(seed), {}
    for number, each in enumerate(found):
        place = number if number < most else generator.randrange(number + 1)
        if place < most:
            kept[place] = number, each
    return [each for _, each in sorted(kept.values(), key=lambda pair: pair[0])]


def draw_documents(part: Part, most: int, seed: int) -> list[numpy.ndarray]:
    """Token ids of `most` documents, or all where there are fewer, of the share of the files that `part` says.

    The files must have been checked, as a job's `resolve` does.
    """
    places = []
    for prefix in part.blend.prefixes:
        index = read_index(prefix)
        assert index is not None, "checked when the job was resolved"
        lengths = index.lengths().astype(numpy.int64)
        first, last = (round(bound * len(lengths)) for bound in part.share)
        starts = numpy.cumsum(lengths) - lengths
        tokens = numpy.memmap(prefix + ".bin", index.dtype, "r")
        places += [(tokens, int(starts[each]), int(lengths[each])) for each in range(first, last)]
    return [tokens[start : start + length] for tokens, start, length in draw(places, most, seed)]
