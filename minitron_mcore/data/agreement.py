"""Whether two tokenizers mean the same by their ids: compared piece by piece, and on texts. Pure."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Optional

from minitron_mcore.data.tokenizer import PROBES, Tokenizer, load_tokenizer
from minitron_mcore.data.tokenizer_files import TEMPLATE_FILES, files_of
from minitron_mcore.errors import InputError

# Beside PROBES: what tokenizers trip over at a text's edges, and in names of marks and bytes.
EDGES = (
    *("", " ", "a", "  x ", "\t\n x", "\n", "a\r\n b ", "x" * 40, " " * 9, "\u2581", "\u2581 x", "a\0b", "\ufeffa"),
    *("</s>", "a</s>b", "<s>", "<unk>x", "<0x0A>", "[INST] a [/INST]", "\ufb01\u2460\uff21  \u00bd", "e\u0301"),
    *("é漢🙂", "漢</s>é", "\u3000a\u00a0b\u200bc\u00add", "한국어 한글", "\u1112\u1161\u11ab \uff76\uff9e", "हिन्दी"),
    "🙂" * 5,
)


def difference(one: Tokenizer, other: Tokenizer, rows: Optional[int] = None) -> Optional[str]:
    """The first difference found between two tokenizers, in words; None where they agree.

    Compares the ids below `rows` that both have, and the cuts of texts into ids below `rows`. A piece that only one has
    is no difference, and marks are not compared.
    """
    pieces, others = one.pieces(), other.pieces()
    for number in sorted(pieces.keys() & others.keys()):
        if (rows is None or number < rows) and pieces[number] != others[number]:
            return f"id {number} is {pieces[number]!r} in the one and {others[number]!r} in the other"
    for text, *cuts in _unlike_cuts(one, other):
        if rows is None or max(map(max, filter(None, cuts)), default=0) < rows:
            return f"{text[:40]!r} is {shown(cuts[0])} in the one and {shown(cuts[1])} in the other"
    return None


def check_saved(tokenizer: Tokenizer, folder: str) -> None:
    """Raise InputError unless transformers reads the same tokenizer from `folder`, where `tokenizer` was saved for it.

    Compares ids, marks and texts. Two cuts that are equally good to a unigram model count as one. Where a chat template
    lies in `folder`, texts that hold a mark's name are not compared: there it is the mark.
    """
    saved = load_tokenizer(folder)
    names = [saved.pieces()[number] for number in saved.added] if files_of(folder, TEMPLATE_FILES) else []
    if unlike := next(_unlike(tokenizer, saved, _scores(folder), names), None):
        rule = f"cannot be written for transformers, which would read it otherwise ({unlike})"
        raise InputError("tokenizer.model", tokenizer.path, rule)


def _unlike(tokenizer: Tokenizer, saved: Tokenizer, scores: list[float], names: list[str]) -> Iterator[str]:
    """The differences in words."""
    marks, others = ((each.bos, each.eos) for each in (tokenizer, saved))
    if marks != others:
        yield f"bos and eos are {marks} here and {others} there"
    here, there = tokenizer.pieces(), saved.pieces()
    for number in sorted(here.keys() | there.keys()):
        if here.get(number) != there.get(number):
            yield f"id {number} is {here.get(number)!r} here and {there.get(number)!r} there"
    for text, ids, theirs in _unlike_cuts(tokenizer, saved, names):
        if not scores or abs(sum(scores[i] for i in ids) - sum(scores[i] for i in theirs)) >= 1e-3:
            yield f"{text[:40]!r} is {shown(ids)} here and {shown(theirs)} there"


def _unlike_cuts(
    one: Tokenizer, other: Tokenizer, without: Sequence[str] = ()
) -> Iterator[tuple[str, list[int], list[int]]]:
    """(text, ids of the one, ids of the other) of each text that the two cut otherwise, and that has none of `without`
    in it."""
    texts = (text for text in (*PROBES, *EDGES) if not any(name in text for name in without))
    cuts = ((text, one.encode(text), other.encode(text)) for text in texts)
    return (cut for cut in cuts if cut[1] != cut[2])


def _scores(folder: str) -> list[float]:
    """The scores of a unigram model's pieces, by their ids; empty for another model."""
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8") as stream:
        model = json.load(stream)["model"]
    return [score for _, score in model["vocab"]] if model.get("type") == "Unigram" else []


def shown(ids: list[int]) -> str:
    return str(ids) if len(ids) <= 8 else f"{str(ids[:8])[:-1]}, …]"
