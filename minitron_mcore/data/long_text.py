"""Ids of a long text, worked out part by part, equal to those of the text given to the tokenizer at once.

Tokenizers need tens of bytes a character while they work. But a part by itself is read otherwise than within its text:
many tokenizers put a space before every text they are given, join what lies across a cut, or look at what follows.

So each part is read with some text before it, whose ids are then left out; and a cut is made only where the ids before
it are the same with and without what follows, and those behind it the same whatever stands far before. For both merges
by rank (BPE) and best paths (unigram), a boundary that no piece crosses leaves either side as it would be alone; but
for rounding, by which a unigram model may choose between two equally good paths. Where no such place is found, the part
goes on to the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

# Characters read before a cut, in two lengths without a common divisor: a rhythm, such as digits taken by threes from
# where a number begins, shows as a difference between them.
CONTEXTS = (1021, 509)
BEHIND = 512  # characters read behind a cut
TRIES = 8  # cuts of each kind that are looked at

Encode = Callable[[str], list[int]]


def encode_long(encode: Encode, text: str, size: int) -> list[int]:
    """`encode(text)`, given at most about `size` characters at a time. `encode` adds no mark at a text's end."""
    ids: list[int] = []
    start = 0
    while True:
        end = _find_cut(encode, text, start, size)
        part = _encode_part(encode, text, start, end)
        if part is None:  # what follows far behind the cut reached over it after all
            return encode(text)
        ids += part
        if end == len(text):
            return ids
        start = end


def _encode_part(encode: Encode, text: str, start: int, end: int) -> list[int] | None:
    """Ids of `text[start:end]` within the text; None where `start` is no boundary between them."""
    before = max(0, start - CONTEXTS[0])
    head = encode(text[before:start]) if start else []
    ids = encode(text[before:end])
    return ids[len(head) :] if ids[: len(head)] == head else None


def _find_cut(encode: Encode, text: str, start: int, size: int) -> int:
    """The last cut up to `start + size`, or else the first farther on, or the text's end."""
    for limit in range(start + size, len(text), size):
        for cut in _candidates(text, max(start, limit - size), limit):
            if _is_boundary(encode, text, cut):
                return cut
    return len(text)


def _candidates(text: str, start: int, limit: int) -> Iterator[int]:
    """Behind and before a line end, before a space, anywhere: the last first. Never among white space or the first."""
    for sign in "\n ":
        place = limit
        for _ in range(TRIES):
            place = text.rfind(sign, start + 1, place)
            if place < 0:
                break
            if sign == "\n" and not text[place + 1 : place + 2].isspace() and not text[place - 1].isspace():
                yield place + 1
            if not text[place - 1].isspace():
                yield place
    yield from range(limit, max(start, limit - TRIES), -1)


def _is_boundary(encode: Encode, text: str, cut: int) -> bool:
    behind = text[cut : cut + BEHIND]
    following = []
    for length in CONTEXTS:
        before = text[max(0, cut - length) : cut]
        head = encode(before)
        ids = encode(before + behind)
        if not before.strip() or ids[: len(head)] != head:
            return False
        following.append(ids[len(head) :])
    return following[0] == following[1]
