"""The table of `evaluate`: tasks by models, with standard errors, what the papers report, and differences. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minitron_mcore.tables import table

LOSSES = {"lm loss": "loss", "ppl": "perplexity"}


def evaluation_table(models: Mapping[str, Mapping[str, Any]], differences: Mapping[str, Mapping[str, Any]]) -> str:
    """`models`: what `evaluate` has of each, by name; `differences`: by name, task and metric, to the first of them."""
    first, *others = models
    header: list[str] = ["task", "shots", "metric"]
    columns: list[tuple[str, str]] = []
    for name, model in models.items():
        columns.append((name, "value"))
        header.append(name)
        if model.get("published"):
            columns.append((name, "published"))
            header.append(f"{model['published']} [B]")
    for name in others:
        columns.append((name, "difference"))
        header.append(f"{name} − {first}")
    rows = []
    for task, metric in _rows(models.values()):
        found = [_cell(models[name], differences.get(name, {}), task, metric, what) for name, what in columns]
        shots = next((each["tasks"][task]["shots"] for each in models.values() if task in each.get("tasks", {})), None)
        rows.append((task, "" if shots is None else shots, metric.removesuffix(",none"), *found))
    return table(rows, header, left=(0, 2))


def _rows(models: Sequence[Mapping[str, Any]] | Any) -> list[tuple[str, str]]:
    found: dict[tuple[str, str], None] = {}
    for model in models:
        for name, word in LOSSES.items():
            if name in model:
                found["held-out text", word] = None
        for task, scores in model.get("tasks", {}).items():
            found |= dict.fromkeys((task, metric) for metric in scores["metrics"])
    return list(found)


def _cell(model: Mapping[str, Any], differences: Mapping[str, Any], task: str, metric: str, what: str) -> str:
    if task == "held-out text":
        name = next(name for name, word in LOSSES.items() if word == metric)
        if what == "difference":
            return with_error(differences.get(name), None, signed=True)
        return with_error(model.get(name), None) if what == "value" else ""
    score = model.get("tasks", {}).get(task, {}).get("metrics", {}).get(metric, {})
    if what == "published":
        return with_error(score.get("published"), None)
    if what == "difference":
        found = differences.get("tasks", {}).get(task, {}).get(metric, {})
        return with_error(found.get("difference"), found.get("stderr"), signed=True)
    return with_error(score.get("value"), score.get("stderr"))


def with_error(value: float | None, stderr: float | None, *, signed: bool = False) -> str:
    """0.4186 ± 0.0049, with four digits behind the point, and fewer of a large number."""
    if value is None:
        return ""
    digits = 4 if abs(value) < 100 else 2
    form = f".{digits}f" if abs(value) < 1e6 else ".4g"
    shown = format(round(value, digits) + 0.0, f"{'+' if signed else ''}{form}")
    return shown if stderr is None else f"{shown} ± {stderr:{form}}"
