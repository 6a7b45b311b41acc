"""The points of a loss: of a training's metrics.jsonl, or of each candidate in a search's candidates.json. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy

from minitron_mcore.errors import InputError
from minitron_mcore.estimate.loss_curve import LEAST_POINTS, LossCurve, NoCurveError, fit
from minitron_mcore.files import first_line, read_mapping, reading

KEY = "estimate.curve"
REMEDY = "wait for more of it, name another, or leave the key out"
Points = tuple[numpy.ndarray, numpy.ndarray]  # tokens, in rising order, and losses


@dataclass(frozen=True)
class Outlook:
    """What the loss of `name` may be after `tokens` tokens: best, and the ends of its 95% interval. what: the loss."""

    name: str
    what: str
    curve: LossCurve
    tokens: int
    best: float
    low: float
    high: float


def outlooks(path: str, tokens: int, sequence_length: int) -> list[Outlook]:
    """Of the training, or of every candidate whose points carry a curve, the lowest loss first.

    sequence_length: of the samples that a metrics.jsonl counts, where no recipe.yaml beside it says it. Raises
    InputError for a file that is neither, and where no points carry a curve.
    """
    found, refused = [], []
    for name, (what, (at, losses)) in points_of(path, sequence_length).items():
        try:
            curve = fit(at, losses)
            found.append(Outlook(name, what, curve, tokens, *curve.at(tokens)))
        except NoCurveError as error:
            refused.append(f"{name} {error}" if name else str(error))
    if not found:
        raise InputError(KEY, path, refused[0] if refused else "holds no points of a loss", REMEDY)
    return sorted(found, key=lambda outlook: outlook.best)


def points_of(path: str, sequence_length: int) -> dict[str, tuple[str, Points]]:
    """Name, "" of a training -> which loss, and its points. Raises InputError for a file that has none."""
    file = Path(path)
    if not file.is_file():
        raise InputError(KEY, path, "is not a file", "name a metrics.jsonl or a candidates.json, or leave the key out")
    with reading(f"{KEY}={path}"):
        text = file.read_text(encoding="utf-8", errors="replace")
    try:
        if file.suffix == ".jsonl":
            # A running training may be in the middle of its last line.
            rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
            return {"": _of_training(rows, _length_beside(file) or sequence_length)}
        return {str(row["name"]): _of_candidate(row) for row in json.loads(text)["candidates"] if row.get("curve")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        rule = f"is neither a training's metrics.jsonl nor a search's candidates.json ({first_line(error)})"
        raise InputError(KEY, path, rule, "name one of these, or leave the key out") from error


def _of_training(rows: list[dict[str, Any]], length: int) -> tuple[str, Points]:
    """Validations where there are enough of them, else every iteration since the learning rate was highest."""
    trained = {row["iteration"]: row for row in rows if row["kind"] == "train" and isfinite(row["lm loss"])}
    peak = max(trained.values(), key=lambda row: row["learning-rate"], default={"iteration": 0})["iteration"]
    valid = {row["iteration"]: row["lm loss validation"] for row in rows if row["kind"] == "validation"}
    valid = {each: loss for each, loss in valid.items() if each in trained and each >= peak and isfinite(loss)}
    what = "held-out lm loss"
    if len(valid) < LEAST_POINTS:
        what, valid = "lm loss", {each: row["lm loss"] for each, row in trained.items() if each >= peak}
    return what, _rising({trained[each]["consumed samples"] * length: loss for each, loss in valid.items()})


def _of_candidate(row: dict[str, Any]) -> tuple[str, Points]:
    return "held-out lm loss", _rising({at: loss for at, loss in row["curve"] if loss is not None and isfinite(loss)})


def _rising(losses: dict[float, float]) -> Points:
    """By tokens; before the first of them a power of tokens says nothing."""
    at = sorted(each for each in losses if each > 0)
    return numpy.array(at, float), numpy.array([losses[each] for each in at], float)


def _length_beside(file: Path) -> int | None:
    """data.sequence_length of the recipe that lies beside a training's metrics."""
    recipe = file.with_name("recipe.yaml")
    length = (read_mapping(recipe).get("data") or {}).get("sequence_length") if recipe.is_file() else None
    return length if isinstance(length, int) else None
