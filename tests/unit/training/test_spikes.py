"""What is told of as a spike, and what is not."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from minitron_mcore.training.spikes import HISTORY, WINDOW, Spikes, in_words

STEPS = 600


def curve(seed: int) -> list[dict[str, Any]]:
    """A loss that falls from 8 to 2 with noise, and a norm that falls by factors, as trainings have them."""
    draw = random.Random(seed)
    rows = []
    for step in range(STEPS):
        loss = 2 + 6 * math.exp(-step / 60) + draw.gauss(0, 0.05)
        rows.append({"lm loss": loss, "grad-norm": (0.5 + 3 * math.exp(-step / 60)) * math.exp(draw.gauss(0, 0.15))})
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_spike(seed: int) -> None:
    spikes = Spikes(10.0)
    assert [step for step, row in enumerate(curve(seed)) if spikes.found(row)] == []


def test_a_leap_is_told_with_how_far_it_is() -> None:
    """Against the same formula, written out for the iteration."""
    rows = curve(1)
    rows[400] |= {"lm loss": 4.0}
    rows[420] |= {"grad-norm": 30.0}
    spikes = Spikes(10.0)
    found = {step: spike for step, row in enumerate(rows) if (spike := spikes.found(row))}
    assert {step: list(spike) for step, spike in found.items()} == {400: ["lm loss"], 420: ["grad-norm"]}
    before = [row["lm loss"] for row in rows[400 - WINDOW : 400]]
    middle = median(before)
    deviations = (4.0 - middle) / (1.4826 * median(abs(each - middle) for each in before))
    assert found[400]["lm loss"] == pytest.approx({"value": 4.0, "median": middle, "deviations": deviations})
    assert found[420]["grad-norm"]["median"] == pytest.approx(
        median(row["grad-norm"] for row in rows[320:420]), rel=1e-2
    )
    line = in_words(400, found[400])
    assert line.startswith(" iteration 400 | spike: lm loss 4, ") and line.endswith(", the median before |")
    assert not any(map(Spikes(0.0).found, rows)), "switched off"


def test_the_loss_that_is_trained_is_judged() -> None:
    spikes = Spikes(10.0)
    for _ in range(HISTORY):
        assert not spikes.found({"loss": 1.0, "lm loss": 2.0, "grad-norm": 0.0})
    assert not spikes.found({"loss": 1.0, "lm loss": 50.0, "grad-norm": math.nan})
    assert list(spikes.found({"loss": 9.0, "lm loss": 2.0})) == ["loss"]
    assert not Spikes(10.0).found({"lm loss": 9.0}), "nothing before it"


def test_a_resumed_training_judges_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    rows, file = curve(2), tmp_path / "metrics.jsonl"
    lines = [json.dumps({"iteration": step, "kind": "train", **row}) for step, row in enumerate(rows)]
    lines.insert(200, json.dumps({"iteration": 200, "kind": "validation", "lm loss": 99.0}))
    file.write_text("\n".join(lines) + "\n")
    whole, resumed = Spikes(10.0), Spikes(10.0)
    for row in rows:
        whole.found(row)
    resumed.read(file)
    leap = {"lm loss": 3.1, "grad-norm": 2.0}
    assert whole.found(leap) and resumed.found(leap)
    assert whole._last == resumed._last
    resumed.read(tmp_path / "none")
