"""The road walked: which steps are done, how they were started, what each took. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_mcore.report.gather.place import Place, read_lines
from minitron_mcore.report.gather.trainings import number
from minitron_mcore.report.journal import JOURNAL


@dataclass(frozen=True)
class StepDone:
    """seconds: of all that is noted of it; None: nothing is."""

    name: str
    title: str
    is_done: bool
    seconds: float | None


@dataclass(frozen=True)
class Start:
    """A command that worked on the run. versions: of packages."""

    command: str
    time: float
    ranks: int
    device: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Road:
    """steps: in order. is_whole: whether steps that are not done yet are known too. forecasts: title of a training ->
    bytes of a rank."""

    steps: tuple[StepDone, ...]
    is_whole: bool
    starts: tuple[Start, ...]
    forecasts: dict[str, float]

    @property
    def num_done(self) -> int:
        return sum(step.is_done for step in self.steps)


def find_road(place: Place, planned: Sequence[tuple[str, str]]) -> Road | None:
    """planned: (name in done/, title) of every step, where they are known; () else. None for what is no run."""
    if place.kind != "run":
        return None
    lines = read_lines(place.folder / JOURNAL)
    noted = [line for line in lines if line.get("kind") == "step" and isinstance(line.get("name"), str)]
    titles = {line["name"]: str(line.get("title") or line["name"]) for line in noted}
    seconds = {line["name"]: float(line["seconds"]) for line in noted if number(line.get("seconds")) is not None}
    done = [path.stem for path in sorted((place.folder / "done").glob("*.json"), key=_age)]
    names = dict(planned) or {name: titles.get(name, name.replace("-", " ")) for name in done}
    steps = (StepDone(name, title, name in done, seconds.get(name)) for name, title in names.items())
    forecasts = {
        titles[line["name"]]: float(sum(line["forecast"].values()))
        for line in noted
        if isinstance(line.get("forecast"), dict) and None not in map(number, line["forecast"].values())
    }
    return Road(tuple(steps), bool(planned), tuple(_starts(lines)), forecasts)


def _starts(lines: Sequence[dict[str, Any]]) -> list[Start]:
    found = []
    for line in lines:
        if (
            line.get("kind") == "start"
            and isinstance(line.get("command"), str)
            and number(line.get("time")) is not None
        ):
            versions = line.get("versions") if isinstance(line.get("versions"), dict) else {}
            told = {str(name): str(version) for name, version in (versions or {}).items()}
            ranks = int(number(line.get("ranks")) or 0)
            found.append(Start(line["command"], float(line["time"]), ranks, str(line.get("device", "")), told))
    return found


def _age(path: Path) -> float:
    return path.stat().st_mtime
