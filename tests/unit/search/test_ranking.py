"""The ranking of a search: places, Spearman's correlation, the Pareto front, halving tried on full curves, plots."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron_mcore.search.candidates import Candidate
from minitron_mcore.search.figures import costs_figure, write_costs, write_curves
from minitron_mcore.search.ranking import (
    halved,
    mean_ranks,
    pareto_front,
    ranked,
    spearman,
    summary,
    table,
)
from tests.distributed.models import tiny

TEACHER = tiny("llama")


def candidate(layers: int, **figures: float) -> Candidate:
    return Candidate(TEACHER.replace(num_layers=layers), {"total_parameters": 100 * layers, **figures})


def result(each: Candidate, zero_shot: float | None, *losses: float | None, tokens: int = 0) -> dict[str, Any]:
    """Compared after every hundred tokens."""
    curve = [[0, zero_shot], *([100 * place, loss] for place, loss in enumerate(losses, start=1))]
    told = {"name": each.name, "zero_shot": zero_shot, "loss": losses[-1], "curve": curve, "diverged": None}
    return {**told, "tokens": tokens or 100 * len(losses), "rung": len(losses), "made_with": "x"}


FOUR = [candidate(layers) for layers in (1, 2, 3, 4)]


def test_those_that_halving_stopped_rank_below_those_that_went_on() -> None:
    """Whatever their loss says; what diverged is last, however far it came."""
    results = [
        result(FOUR[0], 9.0, 5.0),
        result(FOUR[1], 8.0, 4.0, 3.0),
        result(FOUR[2], 7.0, 4.5, 3.5),
        result(FOUR[3], 6.0, 4.0, None),
    ]
    found = ranked(FOUR, results)
    assert [each.candidate for each in found.rows] == [FOUR[1], FOUR[2], FOUR[0], FOUR[3]]
    assert [each.rank for each in found.rows] == [1, 2, 3, 4]
    assert [each.zero_shot_rank for each in found.rows] == [3, 2, 4, 1]
    # 1 - 6 (2² + 0² + 1² + 3²) / (4 x 15)
    assert found.correlation == pytest.approx(1 - 6 * 14 / 60)
    assert "training: -0.40, over 4 candidates" in summary(found)


def test_equals_share_a_rank() -> None:
    found = ranked(
        FOUR,
        [
            result(each, 9.0 + place // 2, loss)
            for place, (each, loss) in enumerate(zip(FOUR, (3.0, 3.0, 2.0, 3.0), strict=True))
        ],
    )
    assert [each.rank for each in found.rows] == [1, 2, 2, 2]
    assert sorted(each.zero_shot_rank for each in found.rows) == [1, 1, 3, 3]
    assert mean_ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1, 3.5, 2]


def test_only_candidates_of_the_grid_that_were_tried_are_ranked() -> None:
    other = candidate(7)
    found = ranked(FOUR, [result(FOUR[2], 9.0, 3.0), result(other, 9.0, 1.0)])
    assert [each.candidate for each in found.rows] == [FOUR[2]] and found.correlation is None
    assert summary(found).startswith("1 candidate: too few")


def test_spearman_is_the_textbooks() -> None:
    """Without ties 1 - 6 Σd² / (n (n² - 1)); with ties Pearson's correlation of the mean ranks, by numpy."""
    draw = random.Random(5)
    for count in (3, 7, 20):
        first, second = (draw.sample(range(100), count) for _ in range(2))
        places = [{value: place for place, value in enumerate(sorted(values))} for values in (first, second)]
        squares = sum((places[0][a] - places[1][b]) ** 2 for a, b in zip(first, second, strict=True))
        assert spearman(first, second) == pytest.approx(1 - 6 * squares / (count * (count**2 - 1)))
    tied = ([1, 1, 2, 3, 3, 3], [4, 2, 2, 5, 6, 6])
    by_hand = np.corrcoef([1.5, 1.5, 3, 5, 5, 5], [3, 1.5, 1.5, 4, 5.5, 5.5])[0, 1]
    assert spearman(*tied) == pytest.approx(by_hand)
    assert spearman([1, 2], [1, 2]) is None and spearman([1, 1, 1], [1, 2, 3]) is None


def test_the_front_is_what_nothing_beats() -> None:
    """Against every pair, one by one."""
    draw = random.Random(3)
    points = {str(number): (draw.randrange(8), draw.randrange(8)) for number in range(20)}
    points["twin"] = points["0"]
    beaten = set()
    for (_, better), (name, worse) in itertools.permutations(points.items(), 2):
        if better[0] <= worse[0] and better[1] <= worse[1] and better != worse:
            beaten.add(name)
    front = pareto_front(points)
    assert {*front} == points.keys() - beaten and [points[name][0] for name in front] == sorted(
        points[name][0] for name in front
    )


def test_the_front_is_of_those_that_trained_to_the_end_and_of_the_budgets_figure() -> None:
    """The largest throughput is the cheapest."""
    shapes = [candidate(layers, decode_throughput=1000 / layers, memory=5) for layers in (1, 2, 3)]
    results = [result(shapes[0], 9.0, 4.0), result(shapes[1], 8.0, 3.6, 3.4), result(shapes[2], 7.0, 3.6, 3.5)]
    by_speed = ranked(shapes, results, ["memory", "decode_throughput"])
    assert by_speed.cost == "decode_throughput"
    assert [each.candidate for each in by_speed.rows if each.on_front] == [shapes[1]]
    assert ranked(shapes, results, ["memory"]).cost == "total_parameters"


def test_halving_is_tried_on_full_curves() -> None:
    """The best at the end, 1, is third after 100 tokens, and second after 200."""
    curves = [(3.3, 2.9, 2.0), (3.2, 3.0, 2.5), (3.1, 2.8, 2.6), (4.0, 3.5, 3.0)]
    results = [result(each, 9.0, *losses) for each, losses in zip(FOUR, curves, strict=True)]
    names = [each.name for each in FOUR]
    early = halved(results, [100], 0.5)
    assert (early.kept, early.winner, early.best) == (((names[1], names[2]),), names[1], names[0])
    assert not early.keeps_the_best and (early.tokens, early.full_tokens) == (4 * 100 + 2 * 200, 1200)
    late = halved(results, [200], 0.5)
    assert late.kept == ((names[0], names[2]),) and late.keeps_the_best and late.tokens == 4 * 200 + 2 * 100
    twice = halved(results, [200, 100], 0.75)
    assert [len(names) for names in twice.kept] == [3, 3] and twice.keeps_the_best
    with pytest.raises(ValueError, match="loss after 150 tokens"):
        halved(results, [150], 0.5)
    with pytest.raises(ValueError, match="the same end"):
        halved([*results, result(candidate(5), 9.0, 3.0)], [100], 0.5)
    # Where nothing was held out at a rung, the trainings' own validations serve.
    for each, (loss, *_) in zip(results, curves, strict=True):
        each["validation"] = [[150, loss]]
    assert halved(results, [150], 0.5).kept == early.kept


def test_table_and_rows() -> None:
    shapes = [candidate(layers, latency=layers / 8) for layers in (1, 2)]
    found = ranked(shapes, [result(shapes[0], 9.0, 4.0), result(shapes[1], None, 3.5)], ["latency"])
    head, first, second = (line.split() for line in table(found).splitlines())
    assert head == ["rank", "before", "candidate", "parameters", "latency", "untrained", "loss", "loss", "tokens"]
    assert first == ["1", "2", shapes[1].name, "200", "0.25", "-", "3.5000", "100", "front"]
    assert second == ["2", "1", shapes[0].name, "100", "0.125", "9.0000", "4.0000", "100", "front"]
    told = {"rank": 1, "zero_shot_rank": 2, "zero_shot": None, "loss": 3.5, "tokens": 100, "on_front": True}
    assert found.rows[0].row == {**shapes[1].row, **told}


def test_plots_are_drawn(tmp_path: Path) -> None:
    """Something is on them: more with more candidates."""
    from matplotlib.image import imread

    results = [result(each, 9.0, 4.0 - place / 9, 3.0) for place, each in enumerate(FOUR[1:])]
    results.append(result(FOUR[0], 9.0, 5.0))
    results[0]["validation"] = [[50, 4.4], [150, 3.6]]
    for number in (1, 4):
        found = ranked(FOUR, results[:number])
        write_costs(found, tmp_path / f"search-{number}.png")
        write_curves(found, tmp_path / f"curves-{number}.png")
    for name in ("search", "curves"):
        few, more = (imread(tmp_path / f"{name}-{number}.png")[..., :3] for number in (1, 4))
        assert few.std() > 0.01 and not np.array_equal(few, more)
    assert len([*tmp_path.iterdir()]) == 4


@pytest.mark.parametrize("cost", ["total_parameters", "decode_throughput"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_names_stay_within_the_frame(cost: str, count: int) -> None:
    """The last of them, at the right end, ran over it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    wide = TEACHER.replace(hidden_size=12288, ffn_hidden_size=49152, num_attention_heads=96, num_query_groups=96)
    shapes = [
        Candidate(wide.replace(num_layers=n), {"total_parameters": n * 10**9, "decode_throughput": 1000 / n})
        for n in range(40, 40 + count)
    ]
    results = [result(each, 9.0, 4.0 - place / 10) for place, each in enumerate(shapes)]
    figure = costs_figure(ranked(shapes, results, [cost]))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (panel,) = figure.axes
    frame = panel.get_window_extent()
    assert len(panel.texts) == count
    for text in panel.texts:
        box = text.get_window_extent(canvas.get_renderer())
        assert frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1, text.get_text()
