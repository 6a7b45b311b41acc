"""A task's score as a statistic of its documents: standard errors, and those of differences between two models on the
same documents. Pure.

The harness says a score's standard error where it is a mean, and none for a perplexity. Here a score is recognised as
one of the statistics below by its value; each has an influence of every document on it, from which the standard errors
of the score, and of a difference between two models paired by document, follow (the delta method).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from minitron_mcore.evaluation.harness.papers import published_score

CLOSE = 1e-6  # of a statistic's value to the score that it is


@dataclass(frozen=True)
class Score:
    """A metric of a task. influences: of each document on the value, float64 [documents], which adds up to 0; None:
    the value is no statistic that is known here. stderr: None where it is not known."""

    value: float
    stderr: float | None
    shots: int | None
    documents: tuple[str, ...]  # digests of the documents, in their order
    influences: numpy.ndarray | None

    def minus(self, other: Score) -> tuple[float, float | None]:
        """The difference, and its standard error where both were measured on the same documents."""
        difference = self.value - other.value
        mine, its = self.influences, other.influences
        if mine is None or its is None or self.documents != other.documents or len(mine) < 2:
            return difference, None
        return difference, _stderr(mine - its)


def in_words(scores: Mapping[str, Mapping[str, Score]], model: str | None) -> dict[str, Any]:
    """Plain data of `scores_of`, by task: `shots`, `documents`, and `metrics`, each with its `value`, `stderr` and,
    where `model` is one of the papers' and they report it, `published`."""
    found: dict[str, Any] = {}
    for task, metrics in scores.items():
        one = next(iter(metrics.values()))
        values: dict[str, dict[str, float | None]] = {}
        for name, score in metrics.items():
            values[name] = {"value": score.value, "stderr": score.stderr}
            if model and (theirs := published_score(model, task, name, score.shots)) is not None:
                values[name]["published"] = theirs
        found[task] = {"shots": one.shots, "documents": len(one.documents), "metrics": values}
    return found


def differences(
    scores: Mapping[str, Mapping[str, Score]], first: Mapping[str, Mapping[str, Score]]
) -> dict[str, dict[str, dict[str, float | None]]]:
    """By task and metric that both have: `difference` to `first`, and its `stderr`."""
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for task, metrics in scores.items():
        for metric, score in metrics.items():
            if (base := first.get(task, {}).get(metric)) is not None:
                difference, stderr = score.minus(base)
                found.setdefault(task, {})[metric] = {"difference": difference, "stderr": stderr}
    return found


def scores_of(results: Mapping[str, Any]) -> dict[str, dict[str, Score]]:
    """Task or group -> metric -> score, of what `lm_eval.evaluate` gives with its samples.

    A metric's name has the filter behind it where there are several, as in `exact_match,strict-match`.
    """
    found: dict[str, dict[str, Score]] = {}
    for task, numbers in results["results"].items():
        names = [name for name, value in numbers.items() if "," in name and "_stderr," not in name and _is_one(value)]
        filters = {name.partition(",")[2] for name in names}
        for name in names:
            metric, _, kept = name.partition(",")
            shown = metric if len(filters) == 1 else name
            stated = numbers.get(f"{metric}_stderr,{kept}")
            shots = results.get("n-shot", {}).get(task)
            found.setdefault(task, {})[shown] = _score(results, task, metric, kept, numbers[name], stated, shots)
    return found


def _is_one(value: object) -> bool:
    return isinstance(value, int | float | numpy.number) and not isinstance(value, bool)


def _score(
    results: Mapping[str, Any], task: str, metric: str, kept: str, value: float, stated: Any, shots: int | None
) -> Score:
    parts = [
        [sample for sample in results["samples"][leaf] if sample["filter"] == kept and metric in sample]
        for leaf in leaves(task, results.get("group_subtasks", {}))
    ]
    influences = _influences([[sample[metric] for sample in part] for part in parts], float(value))
    digests = tuple(f"{sample['doc_id']}:{sample['doc_hash']}" for part in parts for sample in part)
    stderr = float(stated) if _is_one(stated) else None
    if stderr is None and influences is not None and len(influences) > 1:
        stderr = _stderr(influences)
    return Score(float(value), stderr, shots, digests, influences)


def leaves(task: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group, each once; of a task itself."""
    if not groups.get(task):
        return [task]
    return list(dict.fromkeys(leaf for part in groups[task] for leaf in leaves(part, groups)))


def _stderr(influences: numpy.ndarray) -> float:
    return float(influences.std(ddof=1) / math.sqrt(len(influences)))


def _influences(parts: Sequence[Sequence[Any]], value: float) -> numpy.ndarray | None:
    """Of every document on the statistic whose value this is; None where it is none of them."""
    values = [each for part in parts for each in part]
    if not values or any(isinstance(each, str) for each in values):
        return None
    if all(isinstance(each, list | tuple) and len(each) == 2 for each in values):
        return _of_ratio(numpy.array(values, dtype=numpy.float64), value)
    if not all(_is_one(each) or isinstance(each, bool | numpy.bool_) for each in values):
        return None
    numbers = numpy.array(values, dtype=numpy.float64)
    spread = numbers - numbers.mean()
    if _is_close(numbers.mean(), value):
        return spread
    if _is_close(math.exp(min(-numbers.mean(), 700.0)), value):
        return -value * spread
    means = [numpy.mean([float(each) for each in part]) for part in parts]
    if len(parts) > 1 and _is_close(float(numpy.mean(means)), value):  # of a group, whatever its tasks' sizes
        weights = [len(values) / len(parts) / len(part) for part in parts]
        scaled = [
            weight * (float(each) - mean)
            for weight, part, mean in zip(weights, parts, means, strict=True)
            for each in part
        ]
        return numpy.array(scaled)
    return None


def _of_ratio(pairs: numpy.ndarray, value: float) -> numpy.ndarray | None:
    """Of pairs of log-likelihood and weight (words, bytes): exp(−Σ log-likelihood / Σ weight), or its bits."""
    logs, weights = pairs.T
    if not weights.sum():
        return None
    ratio = -logs.sum() / weights.sum()
    influences = (-logs - ratio * weights) / weights.mean()
    if _is_close(math.exp(min(ratio, 700.0)), value):
        return value * influences
    return influences / math.log(2) if _is_close(ratio / math.log(2), value) else None


def _is_close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=CLOSE, abs_tol=1e-12)
