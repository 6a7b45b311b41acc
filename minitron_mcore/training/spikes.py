"""Iterations whose loss or gradient norm leaps above those before: told, and nothing else is done about them. Pure.

A value is a spike where it lies more than `log.spike_deviations` robust standard deviations (1.4826 times the median
distance to the median) above the median of the last WINDOW iterations. The gradient norm, which spreads over factors,
is judged by its logarithm. Nothing is judged before HISTORY iterations, and small spreads count as SMALLEST, so that a
quiet curve is not flagged for a ripple. A loss that falls, as at the start, lies below its median.
"""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

WINDOW, HISTORY = 100, 30  # iterations
SMALLEST = {"loss": 0.01, "grad-norm": 0.1}  # share of the median; of the norm, in its logarithm
NORMAL = 1.4826  # median distance to the median of normally distributed numbers -> their standard deviation
LOSSES = ("loss", "logits distillation loss", "lm loss")  # the first that there is


class Spikes:
    """Of one training. Every rank may have one; a spike enters the window as the other values do."""

    def __init__(self, deviations: float) -> None:
        """deviations: 0: nothing is a spike."""
        self.deviations = deviations
        self._last: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in SMALLEST}

    def read(self, file: Path) -> None:
        """Take over the last rows of `file`, a metrics.jsonl that goes on: a resumed training judges as it would have
        without the stop."""
        if self.deviations and file.is_file():
            with file.open(encoding="utf-8") as stream:
                rows = deque((line for line in stream if '"kind": "train"' in line), maxlen=WINDOW)
            for row in map(json.loads, rows):
                self.found(row)

    def found(self, row: dict[str, Any]) -> dict[str, dict[str, float]]:
        """The names in `row`, an iteration's values, that are spikes -> their `value`, the `median` of those before,
        and `deviations`, by how many they are above it."""
        spikes = {}
        for kind, values in self._last.items():
            name = next((each for each in LOSSES if each in row), "") if kind == "loss" else kind
            value = row.get(name)
            if not self.deviations or value is None or not math.isfinite(value) or (kind != "loss" and value <= 0):
                continue
            value = value if kind == "loss" else math.log(value)
            if len(values) >= HISTORY:
                middle = median(values)
                spread = NORMAL * median(abs(each - middle) for each in values)
                least = SMALLEST[kind] * (abs(middle) if kind == "loss" else 1)
                above = (value - middle) / max(spread, least, 1e-12)
                if above > self.deviations:
                    before = middle if kind == "loss" else math.exp(middle)
                    spikes[name] = {"value": row[name], "median": before, "deviations": above}
            values.append(value)
        return spikes


def in_words(iteration: int, spikes: dict[str, dict[str, float]]) -> str:
    """One line of the console."""
    cells = [
        f"{name} {at['value']:.4g}, {at['deviations']:.1f} deviations above {at['median']:.4g}, the median before"
        for name, at in spikes.items()
    ]
    return f" iteration {iteration} | spike: {'; '.join(cells)} |"
