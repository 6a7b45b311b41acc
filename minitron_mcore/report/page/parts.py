"""What a page is made of; the templates lay it out. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Union

from minitron_mcore.report.figures.svg import count_words
from minitron_mcore.tables import table


@dataclass(frozen=True)
class Drawn:
    """svg: made by figures/, which escapes what it is given."""

    svg: str
    caption: str
    kind: str = field(default="figure", init=False)


@dataclass(frozen=True)
class Table:
    """The first cell of a row is its heading. left: columns that hold words. is_folded: behind its caption, until it is
    opened."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: tuple[int, ...] = ()
    is_folded: bool = False
    kind: str = field(default="table", init=False)


def in_words(part: Table) -> str:
    """A table for the terminal, under its caption."""
    return f"{part.caption}\n{table(part.rows, part.head, left=(0, *part.left), indent='  ')}\n"


@dataclass(frozen=True)
class Words:
    text: str
    kind: str = field(default="words", init=False)


@dataclass(frozen=True)
class Listing:
    """Text as it stands, behind its title until it is opened."""

    title: str
    text: str
    kind: str = field(default="listing", init=False)


Part = Union[Drawn, Table, Words, Listing]


@dataclass(frozen=True)
class Section:
    """name: the page's anchor."""

    name: str
    title: str
    parts: Sequence[Part]


NONE = "–"


def whole(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def decimals(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def short(value: float | None) -> str:
    return NONE if value is None else count_words(value)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    return f"{seconds:.1f} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))
