"""The trainings of a run: losses by tokens, and what a step costs. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_mcore.errors import InputError
from minitron_mcore.recipe import Recipe
from minitron_mcore.report.gather.place import METRICS, Place, read_lines, read_mapping_of, read_recipe
from minitron_mcore.report.gather.samples import align_timetable
from minitron_mcore.training.budget import Timetable, plan_timetable

Curve = tuple[tuple[float, float], ...]  # (tokens, value)
SECTIONS = ("train", "distill", "correct", "align")
STEP, PEAK = "elapsed time per iteration (ms)", "peak memory (GiB)"
RATES = ("tokens per second", "throughput per GPU (TFLOP/s/GPU)", "model FLOPs utilization (%)")


@dataclass(frozen=True)
class Training:
    """curves and validation: by the names in metrics.jsonl, of validation without its word. iterations: all that the
    recipe asks for, None where that is unknown. rates: medians over the logged intervals; parts: a step's shares.
    events: what was noted of single iterations, as skipped ones."""

    label: str
    section: str
    part: Path
    curves: dict[str, Curve]
    validation: dict[str, Curve]
    done: int
    iterations: int | None
    tokens: float
    seconds: float | None
    rates: dict[str, float]
    parts: dict[str, float]
    peak_memory: float | None
    skipped: int

    @property
    def is_cut_off(self) -> bool:
        return self.iterations is not None and self.done < self.iterations


def find_trainings(place: Place) -> tuple[Training, ...]:
    found = (_training(place, part) for part in place.holding(METRICS))
    return tuple(each for each in found if each is not None)


def _training(place: Place, part: Path) -> Training | None:
    rows = [row for row in read_lines(part / METRICS) if isinstance(row.get("iteration"), int)]
    rows = [row for row in rows if row.get("kind") in ("train", "validation")]
    steps = [row for row in rows if row["kind"] == "train"]
    if not steps:
        return None
    section = _section(part)
    timetable = _timetable(part, read_recipe(part) or place.recipe, section)
    tokens_at = _tokens_at(timetable, steps)
    timed = [row for row in steps if number(row.get(STEP)) is not None]
    times = [moment for row in rows if (moment := number(row.get("time"))) is not None]
    done = max(row["iteration"] for row in steps)
    peaks = [peak for row in timed if (peak := number(row.get(PEAK))) is not None]
    return Training(
        label=place.label(part),
        section=section,
        part=part,
        curves=_curves(steps, tokens_at),
        validation=_validation([row for row in rows if row["kind"] == "validation"], tokens_at),
        done=done,
        iterations=timetable.iterations if timetable else None,
        tokens=tokens_at(done),
        seconds=times[-1] - times[0] if len(times) > 1 and times[-1] > times[0] else None,
        rates=_medians(timed, (STEP, *RATES)),
        parts=_shares(timed),
        peak_memory=max(peaks, default=None),
        skipped=int(number(steps[-1].get("number of skipped iterations")) or 0),
    )


def _section(part: Path) -> str:
    stage = read_mapping_of(part / "lineage.yaml").get("stage")
    if stage in SECTIONS:
        return str(stage)
    return {"distilled": "distill", "corrected": "correct"}.get(part.name, "train")


def _timetable(part: Path, recipe: Recipe | None, section: str) -> Timetable | None:
    if recipe is None:
        return None
    if section == "align":
        return align_timetable(part, recipe)
    try:
        return plan_timetable(getattr(recipe, section), recipe.data.sequence_length, section)
    except InputError:
        return None


def _tokens_at(timetable: Timetable | None, steps: Sequence[dict[str, Any]]) -> Callable[[int], float]:
    """Tokens after an iteration; where the timetable is unknown, or another's, samples, or iterations."""
    samples = {row["iteration"]: count for row in steps if (count := number(row.get("consumed samples"))) is not None}
    last = max(samples, default=0)
    if timetable and (not samples or timetable.at(last).samples_before == samples[last]):
        return lambda iteration: float(timetable.at(iteration).tokens_before)
    return lambda iteration: samples.get(iteration, float(iteration))


def _curves(steps: Sequence[dict[str, Any]], tokens_at: Callable[[int], float]) -> dict[str, Curve]:
    names = [name for row in steps[:1] for name in row if name not in ("iteration", "kind", "time")]
    found = {}
    for name in names:
        points = ((tokens_at(row["iteration"]), number(row.get(name))) for row in steps)
        found[name] = tuple((tokens, value) for tokens, value in points if value is not None)
    return found


def _validation(rows: Sequence[dict[str, Any]], tokens_at: Callable[[int], float]) -> dict[str, Curve]:
    """Of the whole blend, by the name of the loss."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name.endswith(" validation") and (found_at := number(value)) is not None:
                found.setdefault(name.removesuffix(" validation"), []).append((tokens_at(row["iteration"]), found_at))
    return {name: tuple(points) for name, points in found.items()}


def _medians(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, float]:
    values = {name: [value for row in rows if (value := number(row.get(name))) is not None] for name in names}
    return {name: statistics.median(several) for name, several in values.items() if several}


def _shares(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Part of a step -> its share of all ranks' time, over all intervals."""
    names = dict.fromkeys(name for row in rows for name in row if name.endswith("-share"))
    means = {
        name.removesuffix("-share"): statistics.mean(number(row.get(name)) or 0.0 for row in rows) for name in names
    }
    return {name: share for name, share in means.items() if share > 0}


def number(value: Any) -> float | None:
    """A finite number from a file; None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None
