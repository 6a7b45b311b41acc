"""Which documents are held out for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar


class Part(Protocol):
    """Documents."""

    def sizes(self) -> list[int]:
        """Tokens of each."""


T = TypeVar("T", bound=Part)

WAITING_TOKENS = 1 << 26  # of documents that are kept in memory until both sides have one


def draw(document: int, seed: int) -> int:
    """A number below 2**64 for a document by its own number and the seed, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{document}".encode()).digest()[:8], "little")


def is_held_out(document: int, fraction: float, seed: int) -> bool:
    """Whether a document goes to the held-out files: `fraction` of all draws do."""
    return bool(fraction) and draw(document, seed) < fraction * 2.0**64


def assign(
    parts: Iterable[T], *, fraction: float, seed: int, report: Callable[[str], None]
) -> Iterator[tuple[T, list[bool]]]:
    """Each of `parts` with, for each of its documents, whether it is held out.

    With few documents the draw may leave one side without any. That side then gets the document whose draw came
    nearest, and `report` a line about it. Empty documents do not count.
    """
    waiting: list[tuple[T, list[bool]]] = []
    tokens = number = 0
    sides: set[bool] = set()
    settled = not fraction
    for part in parts:
        lengths = part.sizes()
        marks = [is_held_out(number + i, fraction, seed) for i in range(len(lengths))]
        number += len(lengths)
        if settled:
            yield part, marks
            continue
        waiting.append((part, marks))
        tokens += sum(lengths)
        sides |= {mark for mark, length in zip(marks, lengths, strict=True) if length}
        settled = len(sides) == 2 or tokens > WAITING_TOKENS
        if settled:
            yield from waiting
            waiting = []
    if waiting and len(sides) == 1:
        _move_one(waiting, sides.pop(), seed, report)
    yield from waiting


def _move_one(waiting: list[tuple[T, list[bool]]], side: bool, seed: int, report: Callable[[str], None]) -> None:
    """Where all documents are on one `side`, put the one whose draw is nearest to the other side there."""
    places = [(marks, i, length) for part, marks in waiting for i, length in enumerate(part.sizes())]
    draws = [(draw(number, seed), number) for number, (_, _, length) in enumerate(places) if length]
    if len(draws) > 1:
        marks, i, _ = places[(max if side else min)(draws)[1]]
        marks[i] = not side
        report(
            f"preprocess: the draw holds out {'all' if side else 'none'} of the {len(draws)} documents, because they "
            f"are few; one of them {'is kept for training' if side else 'is held out'} all the same"
        )
