"""What is known of datasets before they are built: from the recipe, the indices, and what lies beside them. Pure.

Whatever a job would refuse of its data is refused here. Text that another job will write is *promised*: then only what
the recipe says of it is checked, and the rest when the datasets are built.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Optional

import numpy

from minitron_mcore.data.agreement import difference
from minitron_mcore.data.blend import Blend, Bounds, check_prefixes, parse_blend, source_names, surplus
from minitron_mcore.data.config import DataConfig
from minitron_mcore.data.corpus import check_folder
from minitron_mcore.data.index import Index, Wanted, cache_folder, check_index_size, read_index, source_of
from minitron_mcore.data.tokenizer import Tokenizer, load_tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.runtime.notice import warn

WHOLE = (0.0, 1.0)


@dataclass(frozen=True)
class Part:
    """One dataset: a share of a blend's documents, and the number of samples asked of it."""

    name: str  # train, valid or test
    blend: Blend
    share: Bounds
    size: Optional[int]  # None: one pass
    sequence_length: int
    one_pass: bool = False  # refuse to draw the same sample twice
    is_asked_for: bool = True  # else left out where there is not enough of it
    source: str = ""  # what the metrics call it, where it is one source of a blend
    # Of each prefix, once it is described: the tokens in the share, 0 where they are promised. None: they are too few,
    # and nobody asked for them.
    tokens: Optional[tuple[int, ...]] = ()

    @property
    def samples(self) -> int:
        """Different samples of one pass; 0: not known yet."""
        counts = self.tokens or ()
        return sum((count - 1) // self.sequence_length for count in counts) if all(counts) else 0


@dataclass(frozen=True)
class Described:
    """Datasets that can be built, as far as anything is known of them yet."""

    parts: tuple[Part, ...]
    sources: dict[str, Index]  # by prefix, without those that are promised

    @property
    def has_validation(self) -> bool:
        """Whether the whole blend is validated; promised text is taken to be enough."""
        return any(part.name == "valid" and not part.source and part.tokens is not None for part in self.parts)


def describe_training(
    data: DataConfig, tokenizer: Optional[Tokenizer], wanted: Sequence[Wanted], promised: Collection[str] = ()
) -> Described:
    """What a training reads: a set for each of `wanted`, and with those that validate one for each of the sources.

    Nothing validates where nobody asked for held-out text (`data.valid` is null and `data.split` as it is by default,
    or with no share for it) and what `data.split` holds out is less than one sample. tokenizer: None where it is
    promised too. Any rank calls; reads whole indices. Raises InputError.
    """
    check_index_size(data, wanted, promised)
    return describe(data, training_parts(data, wanted, promised), tokenizer, promised)


def describe_calibration(
    data: DataConfig, tokenizer: Optional[Tokenizer], num_samples: int, promised: Collection[str] = ()
) -> Described:
    """What importance is measured on: `data.calibration`, or where that is null the training documents.

    Raises InputError, also where it has fewer than `num_samples` different samples. Else as `describe_training`.
    """
    described = describe(data, [calibration_part(data, num_samples, promised)], tokenizer, promised)
    (part,) = described.parts
    if part.size is None and part.samples:
        check_num_samples(num_samples, part.samples)
    return described


def training_parts(data: DataConfig, wanted: Sequence[Wanted], promised: Collection[str] = ()) -> list[Part]:
    """The sets of `wanted`, those of training first."""
    parts = []
    for each in sorted(wanted, key=lambda each: each.is_validation):
        name = "valid" if each.is_validation else "train"
        if each.is_validation and not (each.samples and source_of(data, name, promised)[1]):
            continue
        is_asked_for = not each.is_validation or data.valid is not None or data.split != DataConfig.split
        part = replace(split_part(data, name, each.samples, promised), sequence_length=each.sequence_length)
        parts.append(part := replace(part, is_asked_for=is_asked_for))
        prefixes, key = list(dict.fromkeys(part.blend.prefixes)), part.blend.key
        if each.is_validation and len(prefixes) > 1:
            alone = zip(source_names(prefixes), prefixes, strict=True)
            parts += [replace(part, blend=Blend((prefix,), None, key), source=source) for source, prefix in alone]
    return parts


def calibration_part(data: DataConfig, num_samples: int, promised: Collection[str] = ()) -> Part:
    """A weighted blend gives about `num_samples` in proportion; anything else one whole pass."""
    check_num_samples(num_samples)
    if data.calibration is None:
        part = split_part(data, "train", num_samples, promised)
    else:
        blend = parse_blend(data.calibration, "data.calibration", promised)
        part = Part("train", blend, WHOLE, num_samples, data.sequence_length)
    return replace(part, size=part.size if part.blend.weights else None, one_pass=True)


def split_part(data: DataConfig, name: str, size: Optional[int], promised: Collection[str] = ()) -> Part:
    """`size` samples of train, valid or test; None: one pass."""
    blend, share = source_of(data, name, promised)
    if share is None:
        remedy = f"give {name} a share" + (", or set data.valid" if name == "valid" else "")
        raise InputError("data.split", data.split, f"leaves no documents for {name}", remedy)
    return Part(name, blend, share, size, data.sequence_length)


def held_out_part(data: DataConfig, samples: int, promised: Collection[str] = ()) -> Part:
    """One pass, so that no sequence counts twice; a weighted blend in its proportions, of `samples` samples."""
    part = split_part(data, "valid", samples, promised)
    return part if part.blend.weights else replace(part, size=None)


def describe(
    data: DataConfig, parts: Sequence[Part], tokenizer: Optional[Tokenizer], promised: Collection[str] = ()
) -> Described:
    """Raise InputError unless each of `parts` can be built, by all that is known."""
    check_prefixes([part.blend for part in parts], promised)
    check_folder(cache_folder(data, parts[0].blend), "data.cache_path")
    indices: dict[str, Index] = {}
    for part in parts:
        for prefix in part.blend.prefixes:
            if prefix not in indices and prefix not in promised:
                indices[prefix] = _checked_index(prefix, part.blend.key, tokenizer)
    return Described(tuple(replace(part, tokens=_count_share(part, indices)) for part in parts), indices)


def check_num_samples(num_samples: int, available: int | None = None) -> None:
    """Raise InputError where importance asks for no samples, or for more different ones than there are."""
    key = "importance.num_samples"
    if num_samples < 1:
        raise InputError(key, num_samples, "must be at least 1")
    if available is not None and num_samples > available:
        rule = f"is more than the {available:,} calibration samples there are"
        remedy = "lower it, give more text (data.calibration), or lower data.sequence_length"
        raise InputError(key, num_samples, rule, remedy)


def _count_share(part: Part, indices: dict[str, Index]) -> Optional[tuple[int, ...]]:
    """Tokens in the part's share of each prefix; None where they are too few for one that nobody asked for."""
    counts = []
    for prefix in part.blend.prefixes:
        if prefix not in indices:
            counts.append(0)
            continue
        lengths = indices[prefix].lengths()
        begin, end = (round(bound * len(lengths)) for bound in part.share)
        counts.append(int(lengths[begin:end].sum(dtype=numpy.int64)))
        if counts[-1] <= part.sequence_length and not part.is_asked_for:
            return None
        _check_enough(part, prefix, counts[-1], end - begin, len(lengths))
    return tuple(counts)


def _check_enough(part: Part, prefix: str, tokens: int, documents: int, total: int) -> None:
    """Megatron would look for samples in an empty share for ever."""
    length, blend = part.sequence_length, part.blend
    if tokens <= length:
        more = " (data.valid, or preprocess.valid_fraction)" if part.name == "valid" else ""
        held = f"{tokens:,} tokens in the {documents:,} of its {total:,} documents that are for {part.name}"
        rule = f"holds {held}, and one sample takes data.sequence_length + 1 = {length + 1:,}"
        raise InputError(blend.key, prefix, rule, f"give more text{more}, or lower data.sequence_length")
    if not part.one_pass or part.size is None or blend.weights is None:
        return
    weight = blend.weights[blend.prefixes.index(prefix)] / sum(blend.weights)
    needed = math.ceil(math.ceil(part.size * weight) * (1 + surplus(blend, part.size)))
    if needed > (available := (tokens - 1) // length):
        rule = f"has {available:,} different samples, too few for its part ({needed:,}) of {part.size:,}"
        raise InputError(blend.key, prefix, rule, "ask for fewer samples, or lower its weight")


def _checked_index(prefix: str, key: str, tokenizer: Optional[Tokenizer]) -> Index:
    """Raises InputError where the files are not whole, or were made with another tokenizer."""
    index, fault = read_index(prefix), ""
    if index is None or not index.is_whole:  # Megatron's reader would fail in ways that depend on where it was cut
        fault = "has an .idx that is cut off or not Megatron's"
    elif not index.is_consistent:
        fault = "has a damaged .idx: its sequences do not follow one another"
    elif not (size := os.path.getsize(prefix + ".bin")):
        fault = "has an empty .bin"
    elif size != (expected := int(index.lengths().sum(dtype=numpy.int64)) * index.dtype.itemsize):
        fault = f"has a .bin of {size:,} bytes, and its index counts {expected:,}"
    if index is None or fault:
        raise InputError(key, prefix, fault, "preprocess the text again")
    _check_tokenizer(index, tokenizer, key)
    return index


def _check_tokenizer(index: Index, tokenizer: Optional[Tokenizer], key: str) -> None:
    prefix = index.prefix
    if tokenizer is None:
        raise InputError(key, prefix, "holds the ids of a tokenizer that is not given", "name it as tokenizer.model")
    rows = tokenizer.vocab_size if tokenizer.rows is None else tokenizer.rows
    try:
        with open(prefix + ".json", encoding="utf-8") as stream:
            made_by = json.load(stream)["tokenizer"]
            fingerprint, model = str(made_by["fingerprint"]), str(made_by["model"])
    except (OSError, ValueError, KeyError, TypeError):  # data from elsewhere: only the ids can tell
        largest = index.largest_token(thorough=tokenizer.rows is not None)
        if largest >= rows:
            rule = f"holds token {largest}, beyond the {rows} of tokenizer.model={tokenizer.path}"
            remedy = "give the tokenizer that made it, or preprocess the text again"
            raise InputError(key, prefix, rule, remedy) from None
        return
    if not tokenizer.is_named_by(fingerprint) and not _is_alike(prefix, tokenizer, model, fingerprint, rows):
        there, here = f"{model}, {fingerprint[:12]}", f"tokenizer.model={tokenizer.path} ({tokenizer.fingerprint[:12]})"
        remedy = "give that one, preprocess the text again, or take its ids as they are with allow=[other_tokenizer]"
        raise InputError(key, prefix, f"was made with another tokenizer ({there}) than {here}", remedy)
    # A few ids are in no text but by name: every token is looked at.
    if (tokenizer.rows is not None or tokenizer.stands_in) and (largest := index.largest_token(thorough=True)) >= rows:
        rule = f"holds {replace(tokenizer, rows=rows).beyond(largest)}"
        raise InputError(key, prefix, rule, "leave out the text that holds it, and preprocess the rest again")


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
