"""The fitted curve of a loss: known curves are found again, with intervals that hold the truth as often as they say;
points that carry none are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from minitron_mcore.estimate.loss_curve import NoCurveError, fit, student
from minitron_mcore.estimate.loss_points import outlooks
from tests.refusals import refuses

E, A, ALPHA = 2.0, 60.0, 0.3
ITERATIONS = numpy.arange(1, 501) * 262144.0
VALIDATIONS = ITERATIONS[19::20]
AHEAD = 8 * ITERATIONS[-1]


def noisy(tokens: numpy.ndarray, noise: float, correlation: float, seed: int, fall: float = A) -> numpy.ndarray:
    draw, errors = numpy.random.default_rng(seed).normal(size=len(tokens)) * noise, numpy.zeros(len(tokens))
    for place in range(len(tokens)):
        before = errors[place - 1] if place else 0.0
        errors[place] = correlation * before + numpy.sqrt(1 - correlation**2) * draw[place]
    return E + fall * tokens**-ALPHA + errors


def test_a_curve_without_noise_is_found() -> None:
    """Within the grid of alpha, whose steps are 2.3%."""
    curve = fit(VALIDATIONS, noisy(VALIDATIONS, 0.0, 0.0, 0))
    assert curve.alpha == pytest.approx(ALPHA, rel=0.02)
    assert pytest.approx(E, abs=0.02) == curve.E
    assert curve.at(AHEAD)[0] == pytest.approx(E + A * AHEAD**-ALPHA, abs=1e-3)


@pytest.mark.parametrize(
    ("tokens", "noise", "correlation"),
    [(ITERATIONS, 0.05, 0.0), (ITERATIONS, 0.01, 0.6), (VALIDATIONS, 0.003, 0.0), (VALIDATIONS, 0.005, 0.5)],
    ids=["iterations", "correlated iterations", "validations", "correlated validations"],
)
def test_intervals_hold_the_truth(tokens: numpy.ndarray, noise: float, correlation: float) -> None:
    """In 100 draws nine tenths at least of what they say, 95%: the correlation comes from the same few points."""
    truth, held, widths = E + A * AHEAD**-ALPHA, 0, []
    for seed in range(100):
        curve = fit(tokens, noisy(tokens, noise, correlation, seed))
        _, low, high = curve.at(AHEAD)
        held += low <= truth <= high
        widths.append(high - low)
    assert held >= 85
    assert numpy.mean(widths) < 0.2 * A * (tokens[0] ** -ALPHA - tokens[-1] ** -ALPHA), "and say something"


@pytest.mark.parametrize(
    ("tokens", "losses", "words"),
    [
        (VALIDATIONS[:7], noisy(VALIDATIONS[:7], 0.0, 0.0, 0), "has 7 points of a loss, and a curve needs 8"),
        (VALIDATIONS[10:], noisy(VALIDATIONS[10:], 0.0, 0.0, 0), "and a curve needs 4 times as many"),
        (VALIDATIONS, noisy(VALIDATIONS, 0.01, 0.0, 0, fall=0.0), "does not fall clearly"),
        (VALIDATIONS, -noisy(VALIDATIONS, 0.001, 0.0, 0), "does not fall clearly"),
        (VALIDATIONS, 9 - numpy.log(VALIDATIONS) / 8, "does not fall as a power of its tokens"),
        (VALIDATIONS, 5 - VALIDATIONS / 1e8, "does not fall clearly"),
    ],
    ids=["few", "short", "flat", "rising", "logarithm", "line"],
)
def test_points_that_carry_no_curve_are_refused(tokens: numpy.ndarray, losses: numpy.ndarray, words: str) -> None:
    with pytest.raises(NoCurveError, match=words):
        fit(tokens, losses)


def test_too_far_ahead_is_refused() -> None:
    curve = fit(VALIDATIONS, noisy(VALIDATIONS, 0.003, 0.0, 0))
    with pytest.raises(NoCurveError, match="more than 30 times as many"):
        curve.at(31 * VALIDATIONS[-1])
    loud = fit(VALIDATIONS, noisy(VALIDATIONS, 0.05, 0.0, 0))
    with pytest.raises(NoCurveError, match=r"wider than the .* it has fallen"):
        loud.at(29 * VALIDATIONS[-1])


@pytest.mark.parametrize(("degrees", "quantile"), [(5, 2.571), (10, 2.228), (30, 2.042), (120, 1.980)])
def test_students_quantile(degrees: int, quantile: float) -> None:
    """Of the tables; the expansion is 0.1% off at the fewest degrees."""
    assert student(degrees) == pytest.approx(quantile, abs=4e-3)


def metrics(folder: Path, losses: numpy.ndarray, valid: dict[int, float], length: int | None = None) -> str:
    """A training's file, with a warm-up that does not count and a last line that is being written."""
    lines: list[Any] = []
    for number, loss in enumerate(losses, 1):
        rate = min(1.0, number / 20) * 1e-3
        row = {"iteration": number, "kind": "train", "consumed samples": 64 * number, "learning-rate": rate}
        lines.append({**row, "lm loss": loss if number >= 20 else 50.0})
        if number in valid:
            lines.append({"iteration": number, "kind": "validation", "lm loss validation": valid[number]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 9')
    if length:
        (folder / "recipe.yaml").write_text(f"data: {{sequence_length: {length}}}\n")
    return str(folder / "metrics.jsonl")


def test_a_running_training(tmp_path: Path) -> None:
    """Iterations where validations are few, validations where there are enough; the sequence length of its recipe."""
    losses = noisy(ITERATIONS, 0.01, 0.0, 0)
    path = metrics(tmp_path, losses, {})
    (found,) = outlooks(path, int(AHEAD), 4096)
    assert found.what == "lm loss" and found.low < E + A * AHEAD**-ALPHA < found.high
    assert found.curve.first >= 20 * 64 * 4096
    path = metrics(
        tmp_path, losses, {20 * n: float(E + 0.5 + A * (20 * n * 262144.0) ** -ALPHA) for n in range(1, 26)}, 4096
    )
    (found,) = outlooks(path, int(AHEAD), 1)
    assert found.what == "held-out lm loss"
    assert found.best == pytest.approx(E + 0.5 + A * AHEAD**-ALPHA, abs=1e-2)


def test_candidates_of_a_search(tmp_path: Path) -> None:
    """The lowest loss first; one that carries no curve is left out beside those that do."""
    rows: list[dict[str, Any]] = []
    for name, more, seed in (("b", 0.2, 3), ("a", 0.1, 4)):
        losses = noisy(VALIDATIONS, 0.002, 0.0, seed) + more
        rows.append({"name": name, "curve": [[0, 9.0], *map(list, zip(VALIDATIONS, losses, strict=True))]})
    rows.append({"name": "flat", "curve": [[at, 3.0] for at in VALIDATIONS]})
    rows.append({"name": "untried", "curve": None})
    path = tmp_path / "candidates.json"
    path.write_text(json.dumps({"candidates": rows}))
    assert [each.name for each in outlooks(str(path), int(AHEAD), 1)] == ["a", "b"]
    path.write_text(json.dumps({"candidates": rows[2:]}))
    with refuses("estimate.curve", path, "flat does not fall clearly", "wait for more of it"):
        outlooks(str(path), int(AHEAD), 1)


def test_files_that_hold_no_curve(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "words.json").write_text(json.dumps({"candidates": [{"name": "a", "curve": [[1, "low"]]}]}))
    (tmp_path / "lost.json").write_text('{"candidates": [{"name": "a", "curve": [[1, NaN], [2, Infinity]]}]}')
    row = {"kind": "train", "consumed samples": 0, "learning-rate": 1e-3, "lm loss": 2.0}
    rows = [{**row, "iteration": each} for each in range(9)]
    (tmp_path / "early.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    for name, rule in (
        ("none.jsonl", "is not a file"),
        ("other.json", "is neither a training's metrics.jsonl nor a search's candidates.json"),
        ("empty.jsonl", "has 0 points of a loss"),
        ("words.json", "is neither a training's metrics.jsonl nor a search's candidates.json"),
        ("early.jsonl", "has 0 points of a loss"),
        ("lost.json", "a has 0 points of a loss"),
    ):
        with refuses("estimate.curve", tmp_path / name, rule):
            outlooks(str(tmp_path / name), 10**9, 1)


def test_trainings_of_the_quickstart() -> None:
    """`lm loss` of each iteration of two trainings of configs/quickstart.yaml. The first half of one says the end; that
    of the other, which falls faster than any power as its learning rate decays, is refused."""
    stored = json.loads((Path(__file__).parent / "quickstart_losses.json").read_text())

    def training(name: str) -> tuple[numpy.ndarray, numpy.ndarray]:
        found = stored[name]
        losses, first = numpy.array(found["lm loss"]), found["warm-up"]
        return found["tokens of an iteration"] * numpy.arange(1, len(losses) + 1)[first:], losses[first:]

    tokens, losses = training("random weights")
    half = len(tokens) // 2
    best, low, high = fit(tokens[:half], losses[:half]).at(tokens[-1])
    end = losses[-10:].mean()
    assert low < end < high and best == pytest.approx(end, abs=0.05)
    assert high - low < (losses[0] - end) / 4, "which says something"
    tokens, losses = training("teacher")
    with pytest.raises(NoCurveError, match="does not fall as a power"):
        fit(tokens[: len(tokens) // 2], losses[: len(tokens) // 2])
