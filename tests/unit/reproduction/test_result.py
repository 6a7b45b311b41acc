"""The section's refusals, and what a result says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from minitron_mcore.reproduction.config import ArmConfig, Order, ReproduceConfig, parse_orders
from minitron_mcore.reproduction.figure import figure_of
from minitron_mcore.reproduction.measured import Measured, read_measured, write_measured
from minitron_mcore.reproduction.result import in_words, page, read_results, result_of
from tests.refusals import refuses

ARMS = {"kl": ArmConfig(paper=2.107), "both": ArmConfig(paper=2.117), "mse": ArmConfig()}


def test_orders_are_of_neighbours() -> None:
    found = parse_orders(["kl < both < mse", "a-b = c+d"], ["kl", "both", "mse", "a-b", "c+d"])
    assert found == (Order("kl", "<", "both"), Order("both", "<", "mse"), Order("a-b", "=", "c+d"))


@pytest.mark.parametrize(
    ("given", "key", "rule"),
    [
        ({"orders": ["kl"]}, "orders[0]", "compares no two arms"),
        ({"orders": ["kl < mse", "kl<both"]}, "orders[1]", "compares no two arms"),
        ({"orders": ["kl < both < kd"]}, "orders[0]", "names kd, which is no arm"),
        ({"arms": {"a b": ArmConfig()}}, "arms.a b", "is to be a folder's name"),
        ({"teacher": "../x"}, "teacher", "is to be a folder's name"),
        ({"seeds": []}, "seeds", "is empty"),
        ({"seeds": [1, 1]}, "seeds", "holds 1 twice"),
        ({"documents": 1}, "documents", "must be at least 2"),
        ({"margin": 0.0}, "margin", "above 0"),
        ({"confidence": 1.0}, "confidence", "below 1"),
    ],
)
def test_what_is_no_comparison_is_refused(given: dict[str, Any], key: str, rule: str) -> None:
    with refuses(key, rule=rule):
        ReproduceConfig(**{"arms": ARMS, **given})


@pytest.fixture
def result() -> dict[str, Any]:
    """`both` is worse than `kl` by a tenth on every document with every seed, `mse` by more or less than nothing."""
    draw = numpy.random.default_rng(3)
    base = draw.normal(3, 0.2, size=(2, 40)) * 100
    noise = draw.normal(0, 5, size=(2, 40))
    nats = {"kl": base, "both": base + 10 + draw.normal(0, 0.5, size=(2, 40)), "mse": base + noise - noise.mean()}
    config = ReproduceConfig(
        claim="a claim", source="a paper", arms=ARMS, orders=["kl < both", "kl < mse"], seeds=[1, 2], margin=0.01
    )
    found = {arm: [Measured({}, [100] * 40, each.tolist()) for each in those] for arm, those in nats.items()}
    return result_of("losses", config, found)


def test_the_result_has_differences_and_verdicts(result: dict[str, Any]) -> None:
    first, second = result["orders"]
    assert first["difference"] == pytest.approx(-0.1, abs=2e-3) and first["verdict"] == "holds"
    assert first["paper"] == pytest.approx(-0.01) and second["paper"] is None
    assert second["verdict"] == "undecided" and result["verdict"] == "undecided"
    assert (result["documents"], result["tokens"], result["arms"]["kl"]["paper"]) == (40, 4000, 2.107)
    assert len(result["arms"]["kl"]["seeds"]) == 2


def test_the_tables(result: dict[str, Any], tmp_path: Path) -> None:
    shown, written = in_words(result), page([result, result | {"name": "other", "verdict": "holds"}])
    assert "losses: a claim (a paper)" in shown and "on 40 documents, 4,000 tokens, 2 seeds" in shown
    assert shown.splitlines()[3].split() == ["arm", "paper", "loss", "seed", "1", "seed", "2"]
    assert shown.splitlines()[-1] == "losses: undecided"
    assert "| losses | a claim | a paper | **undecided** |" in written and "## other: holds" in written
    assert "| kl < both | -0.0100 | -0.1" in written
    figure = figure_of(result)
    left, right = figure.axes
    assert left.get_yticklabels()[0].get_text() == "both"  # the highest loss below
    assert [text.get_text() for text in right.get_yticklabels()] == ["kl < mse", "kl < both"]


def test_a_damaged_result_is_left_out_of_the_page(result: dict[str, Any], tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.json" for name in ("whole", "cut", "other", "list")]
    text = json.dumps(result)
    for file, held in zip(files, (text, text[:100], '{"name": "x"}', "[]"), strict=True):
        file.write_text(held)
    results, damaged = read_results(files)
    assert results == [json.loads(text)] and damaged == [str(file) for file in files[1:]]


def test_what_was_measured_is_read_again(tmp_path: Path) -> None:
    path, found = tmp_path / "losses.json", Measured({"documents": 2}, [3, 4], [6.5, 7.5])
    assert read_measured(path, {"documents": 2}) is None
    write_measured(path, found)
    assert read_measured(path, {"documents": 2}) == found and found.loss == 2.0
    assert read_measured(path, {"documents": 3}) is None
    for damaged in ("{", "[]", '{"made_with": {}, "tokens": [1], "nats": []}', '{"tokens": [1]}'):
        path.write_text(damaged)
        with refuses("output", path, "does not say what each document loses"):
            read_measured(path, {"documents": 2})
