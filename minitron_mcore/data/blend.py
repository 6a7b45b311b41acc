"""Blends of token files as a recipe names them, and the shares of their documents. Pure."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

from minitron_mcore.errors import InputError
from minitron_mcore.files import refuse_closed

Bounds = tuple[float, float]  # of a share of a file's documents, each in [0, 1]

FORMS = "give the prefix of a .bin/.idx pair, a list of prefixes, or a weight before each prefix"


@dataclass(frozen=True)
class Blend:
    """Token files, and how often each is drawn from; without weights, by their token counts."""

    prefixes: tuple[str, ...]
    weights: Optional[tuple[float, ...]]
    key: str  # where the recipe names them


def parse_blend(value: Union[str, Sequence[Any], None], key: str, promised: Collection[str] = ()) -> Blend:
    """A prefix, a list of prefixes, or weights and prefixes in turn (a list, or one string). Raises InputError.

    promised: prefixes that need not be there yet; one that holds a space is one prefix, as one that is there is.
    """
    if value is None:
        raise InputError(key, None, "is not set", FORMS)
    if isinstance(value, str):
        items = [value] if value in promised or os.path.exists(value + ".idx") else value.split()
    else:
        items = [str(item).strip() for item in value]
    numbers = [as_number(item) for item in items]
    if items and set(numbers) == {None}:
        return Blend(tuple(map(_strip_ending, items)), None, key)
    weights, prefixes = [number for number in numbers[::2] if number is not None], items[1::2]
    if not items or not len(weights) == len(prefixes) == numbers[1::2].count(None) == len(items) / 2:
        raise InputError(key, value, "must be prefixes alone, or a weight before each prefix", FORMS)
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise InputError(key, value, "must have weights above 0", "leave out the prefix that is not to be read")
    return Blend(tuple(map(_strip_ending, prefixes)), tuple(weights), key)


def parse_split(split: str) -> list[Optional[Bounds]]:
    """`969,30,1` to the bounds of train, valid and test among the documents; None where a share is empty."""
    shares = [as_number(item.strip()) for item in str(split).split(",")]
    values = [share or 0.0 for share in shares] + [0.0] * (3 - len(shares))
    is_valid = 1 <= len(shares) <= 3 and all(share is not None and 0 <= share < math.inf for share in shares)
    if not is_valid or not sum(values):
        rule = "must be one to three shares of at least 0, one of them above 0"
        raise InputError("data.split", split, rule, "write the shares of train, valid and test, such as 969,30,1")
    ends = [sum(values[:count]) / sum(values) for count in range(len(values) + 1)]
    return [bounds if value else None for value, bounds in zip(values, itertools.pairwise(ends), strict=True)]


def check_prefixes(blends: Iterable[Blend], promised: Collection[str] = ()) -> None:
    """Raise InputError where files of blends, but for those `promised`, are missing or closed to this user."""
    named = [(blend.key, prefix) for blend in blends for prefix in blend.prefixes if prefix not in promised]
    for key, prefix in named:
        for ending in (".idx", ".bin"):
            refuse_closed(f"{key}: {prefix}{ending}", prefix + ending)
        if not (os.path.isfile(prefix + ".idx") and os.path.isfile(prefix + ".bin")):
            longer = prefix + "_text_document"
            is_short = os.path.isfile(longer + ".idx")
            remedy = f"did you mean {longer}?" if is_short else "write them with `preprocess`, or name others"
            raise InputError(key, prefix, "lacks its .bin or its .idx", remedy)


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


def as_number(item: str) -> Optional[float]:
    try:
        return float(item)
    except ValueError:
        return None


def _strip_ending(prefix: str) -> str:
    return prefix[:-4] if prefix.endswith((".bin", ".idx")) else prefix
