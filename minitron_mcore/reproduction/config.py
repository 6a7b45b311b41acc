"""Recipe section `reproduce`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Optional

from pydantic import Field

from minitron_mcore.errors import InputError
from minitron_mcore.keys import OneOf, Sources, key, section

MODELS = ("distilled", "pruned", "next_token", "random")
NAME, NAMES = re.compile(r"\w[\w.+-]*"), "use letters, digits, . + - and _"
_RELATION = re.compile(r"\s([<=])\s")


@dataclass(frozen=True)
class Order:
    """The loss of `left` is below that of `right` (relation "<"), or differs from it by less than a margin ("=")."""

    left: str
    relation: str
    right: str

    def __str__(self) -> str:
        return f"{self.left} {self.relation} {self.right}"


def parse_orders(lines: Sequence[str], arms: Sequence[str]) -> tuple[Order, ...]:
    """Every relation of neighbours in `lines`. Raises InputError for what is no order of `arms`."""
    found: list[Order] = []
    for place, line in enumerate(lines):
        parts = _RELATION.split(line)
        names = [part.strip() for part in parts[::2]]
        path = f"orders[{place}]"
        if len(names) < 2:
            raise InputError(path, line, "compares no two arms", "write a < b, or a = b, with blanks around the sign")
        for name in names:
            if name not in arms:
                known = f"its arms are {', '.join(arms)}" if arms else "name it in reproduce.arms"
                raise InputError(path, line, f"names {name}, which is no arm", known)
        found += map(Order, names[:-1], parts[1::2], names[1:])
    return tuple(found)


@section
class ArmConfig:
    """One side of a comparison: a run of its own, of which one model is measured."""

    keys: dict[str, Any] = key({}, "what of the recipe it changes, as on the command line: {distill.lm_weight: 1}")
    model: Annotated[str, OneOf(*MODELS)] = key(
        "distilled", "which model is measured: the last student, or one of run.baselines"
    )
    paper: Optional[float] = key(None, "the value that the source reports")


@section
class ReproduceConfig:
    """A claim of a paper, as an order of measured losses."""

    claim: Optional[str] = key(None, "the claim, in a sentence")
    source: Optional[str] = key(None, "paper, and section or table")
    arms: dict[str, ArmConfig] = key({}, "what is compared, by name")
    orders: list[str] = key(
        [],
        "what the claim says of the arms' losses: `a < b < c`, or `a = b` for arms that differ by less than the margin",
        distinct=True,
    )
    seeds: list[Annotated[int, Field(ge=0)]] = key(
        [1, 2, 3], "each has a teacher, students and random draws of its own", filled=True, distinct=True
    )
    teacher: str = key("teacher", "what the teachers are called, which claims of the same name share", filled=True)
    input: Sources = key(
        None, "text of its own on which students are distilled and measured, read as `input`; null: the teacher's"
    )
    documents: int = key(256, "held-out documents that are measured, or all where there are fewer", at_least=2)
    document_tokens: int = key(512, "of each document, its first tokens", at_least=2)
    margin: float = key(0.01, "nats a token by which arms may differ that are held to be alike", above=0)
    confidence: float = key(0.95, "of the intervals of all differences", above=0, below=1)

    def __post_init__(self) -> None:
        for name in self.arms:
            if not NAME.fullmatch(name):
                raise InputError(f"arms.{name}", None, "is to be a folder's name", NAMES)
        if not NAME.fullmatch(self.teacher):
            raise InputError("teacher", self.teacher, "is to be a folder's name", NAMES)
        parse_orders(self.orders, [*self.arms])
