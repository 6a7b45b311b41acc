"""Engines and models in turn, so that what slows the machine for a while slows all of them alike. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from minitron_mcore.bench.engines import EngineError, SizeError
from minitron_mcore.bench.figures import Case, Run


class Seat(Protocol):
    """One model in one engine."""

    engine: str
    model: str
    version: str

    @property
    def kv_cache(self) -> str:
        """Number format of its keys and values, once it is loaded."""
        ...

    def load(self) -> None: ...

    def close(self) -> None: ...

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Run: ...

    def tokens(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]: ...


Prompts = Callable[[Seat, Case], Sequence[Sequence[int]]]
Say = Callable[[str], Any]


@dataclass
class Measured:
    """What came of each seat, by (engine, model), and case. failures: what it said; with None for a case, of all that
    it was not measured at before."""

    repeats: int
    runs: dict[tuple[tuple[str, str], Case], list[Run]] = field(default_factory=lambda: defaultdict(list))
    tokens: dict[tuple[tuple[str, str], Case], list[list[int]]] = field(default_factory=dict)
    failures: dict[tuple[tuple[str, str], Case | None], str] = field(default_factory=dict)

    def is_whole(self, who: tuple[str, str], case: Case) -> bool:
        """Whether it ran as often as was asked."""
        return len(self.runs.get((who, case), ())) == self.repeats


def measure(
    seats: Sequence[Seat],
    cases: Sequence[Case],
    prompts: Prompts,
    *,
    repeats: int,
    warmup: int,
    together: bool,
    say: Say,
) -> Measured:
    """Every case `repeats` times, the seats in turn, each `warmup` times before. An engine that fails with a model is
    left out from there on, or for that size alone (SizeError), and told. together: all are loaded at once, else each
    for its turn."""
    found = Measured(repeats)

    def name(seat: Seat) -> tuple[str, str]:
        return seat.engine, seat.model

    @contextmanager
    def guarded(seat: Seat, case: Case | None = None) -> Iterator[None]:
        try:
            yield
        except EngineError as error:
            only = case if isinstance(error, SizeError) else None
            found.failures[name(seat), only] = str(error)
            say(f"{seat.engine} leaves {seat.model} out{f' at {only}' if only else ''}: {error}")

    def is_left(seat: Seat, case: Case | None = None) -> bool:
        return not {(name(seat), None), (name(seat), case)} & found.failures.keys()

    def warm_up(seat: Seat, case: Case) -> None:
        key, given = (name(seat), case), prompts(seat, case)
        if key not in found.tokens:
            found.tokens[key] = seat.tokens(given, case.output_tokens)
        for _ in range(warmup):
            seat.run(given, case.output_tokens)

    def take(seat: Seat, case: Case) -> None:
        found.runs[name(seat), case].append(seat.run(prompts(seat, case), case.output_tokens))

    if not together:
        for repeat in range(repeats):
            say(f"repeat {repeat + 1} of {repeats}")
            for seat in filter(is_left, seats):
                with guarded(seat), loaded([seat]):
                    for case in cases:
                        if is_left(seat, case):
                            with guarded(seat, case):
                                warm_up(seat, case)
                                take(seat, case)
        return found
    with loaded([]) as opened:
        for seat in seats:
            with guarded(seat):
                seat.load()
                opened.append(seat)
        for case in cases:
            say(str(case))
            for turn in [warm_up, *repeats * [take]]:
                for seat in seats:
                    if is_left(seat, case):
                        with guarded(seat, case):
                            turn(seat, case)
    return found


@contextmanager
def loaded(seats: Sequence[Seat]) -> Iterator[list[Seat]]:
    """Load `seats`; these, and what is added to the list within, are closed at the end."""
    opened: list[Seat] = []
    try:
        for seat in seats:
            seat.load()
            opened.append(seat)
        yield opened
    finally:
        for seat in opened:
            seat.close()
