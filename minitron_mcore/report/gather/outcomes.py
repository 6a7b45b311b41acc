"""What came of it: held-out losses, and the files of `search` and `estimate`. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_mcore.report.gather.measured import models_of
from minitron_mcore.report.gather.place import CANDIDATES, ESTIMATE, RESULTS, Place, read_json
from minitron_mcore.report.gather.trainings import Curve, number

LOSS = "lm loss"


@dataclass(frozen=True)
class Outcome:
    """A model's held-out loss. row: as `evaluate` wrote it."""

    label: str
    loss: float
    row: Mapping[str, Any]

    def count(self, name: str) -> float | None:
        return number(self.row.get(name))


@dataclass(frozen=True)
class Candidate:
    """A shape that a search listed, and what came of its trial; rank: None where it was not tried."""

    name: str
    row: Mapping[str, Any]
    rank: int | None
    before: float | None
    loss: float | None
    on_front: bool
    curve: Curve
    validation: Curve

    def count(self, name: str) -> float | None:
        return number(self.row.get(name))


@dataclass(frozen=True)
class Search:
    """candidates: in the file's order, the best first. budgets: as asked for. correlation: of the ranks before and
    after training."""

    candidates: tuple[Candidate, ...]
    budgets: Mapping[str, Any]
    correlation: float | None
    shapes: float | None


@dataclass(frozen=True)
class Spent:
    """What `estimate` says of a training. memory: bytes by part, of the rank that needs most."""

    title: str
    tokens: float | None
    seconds: float | None
    gpu_hours: float | None
    cost: float | None
    kilowatt_hours: float | None
    memory: Mapping[str, float]


@dataclass(frozen=True)
class Estimated:
    gpus: int
    device: str
    trainings: tuple[Spent, ...]
    on_cpu: bool = False  # the `gpus` are ranks of a CPU


def find_outcomes(place: Place) -> tuple[Outcome, ...]:
    """Of the run's own table where it has ended, else of what was evaluated so far."""
    files = {place.label(part): read_json(part / RESULTS) for part in place.holding(RESULTS)}
    rows = models_of(files.get(place.name), place.name)
    if not any(map(_is_result, rows.values())):
        rows = {name: row for label, found in files.items() for name, row in models_of(found, label).items()}
    return tuple(Outcome(label, float(row[LOSS]), row) for label, row in rows.items() if _is_result(row))


def _is_result(row: Any) -> bool:
    return isinstance(row, dict) and number(row.get(LOSS)) is not None


def find_search(place: Place) -> Search | None:
    for folder in (place.folder, place.folder / "search"):
        found = read_json(folder / CANDIDATES)
        if isinstance(found, dict) and isinstance(found.get("candidates"), list):
            budgets = found.get("budgets")
            candidates = tuple(_candidates(found["candidates"]))
            correlation, shapes = number(found.get("correlation")), number(found.get("shapes"))
            return Search(candidates, budgets if isinstance(budgets, dict) else {}, correlation, shapes)
    return None


def _candidates(rows: list[Any]) -> Iterator[Candidate]:
    for row in rows:
        if not isinstance(row, dict) or "name" not in row:
            continue
        rank, loss, before = (number(row.get(name)) for name in ("rank", "loss", "zero_shot"))
        curve, validation = (_points(row.get(name)) for name in ("curve", "validation"))
        tried = int(rank) if rank is not None else None
        yield Candidate(str(row["name"]), row, tried, before, loss, row.get("on_front") is True, curve, validation)


def _points(rows: Any) -> Curve:
    """(tokens, loss), but for the loss before training, and losses that are no numbers."""
    pairs = (row for row in rows or () if isinstance(row, list) and len(row) == 2)
    points = ((number(tokens), number(loss)) for tokens, loss in pairs)
    return tuple((tokens, loss) for tokens, loss in points if tokens and loss is not None)


def find_estimate(place: Place) -> Estimated | None:
    found = read_json(place.folder / ESTIMATE)
    if not isinstance(found, dict) or not isinstance(found.get("trainings"), list):
        return None
    machine = found.get("machine")
    device = machine.get("device") if isinstance(machine, dict) else None
    gpus = int(number(found.get("gpus")) or 0)
    spent = tuple(_spent(row) for row in found["trainings"] if isinstance(row, dict))
    return Estimated(gpus, str(device or ""), spent, found.get("on_cpu") is True)


def _spent(row: Mapping[str, Any]) -> Spent:
    cost = row["cost"] if isinstance(row.get("cost"), dict) else {}
    memory = row["memory"] if isinstance(row.get("memory"), dict) else {}
    parts = memory.get("parts") if isinstance(memory.get("parts"), dict) else {}
    sizes = {str(name): size for name, value in (parts or {}).items() if (size := number(value))}
    names = ("seconds", "gpu_hours", "cost", "kilowatt_hours")
    figures = {name: number(cost.get(name)) for name in names}
    return Spent(title=str(row.get("title", "")), tokens=number(row.get("tokens")), memory=sizes, **figures)


def exported(place: Place) -> list[Path]:
    """The Hugging Face folders of a run."""
    return sorted(path for path in (place.folder / "hf").glob("*") if (path / "config.json").is_file())
