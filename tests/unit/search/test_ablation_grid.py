"""The grid of an ablation: what makes no difference is not tried twice, what there is not is refused; its CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.errors import InputError
from minitron_mcore.search.ablation import (
    Row,
    Setting,
    best_first,
    grid_of,
    read_rows,
    shapes_of,
    squares,
    table,
    write_plot,
    write_rows,
)
from minitron_mcore.search.config import AblateConfig
from tests.distributed.models import tiny
from tests.refusals import refuses

TEACHER = tiny("llama", num_attention_heads=8)
WIDTH = TEACHER.replace(hidden_size=32, ffn_hidden_size=64)
ALL = WIDTH.replace(num_layers=2, num_attention_heads=4)
PAIRS = [f"{batch}/{sequence}" for batch in ("l2", "mean", "var") for sequence in ("l2", "mean", "var")]
MENU: dict[str, Any] = {
    "methods": ["activation", "magnitude", "random"],
    "aggregations": PAIRS,
    "neuron_sites": ["pre_activation", "down_projection_input"],
    "depth_metrics": ["block_influence", "lm_loss"],
    "layers": ["scattered", "contiguous"],
    "head_residuals": ["none", "paper", "laco"],
    "residual_matrices": ["query", "query+output"],
    "random_seeds": 2,
}


def grid(shape: Any, *, layers_given: bool = False, per_axis: bool = False, **choices: Any) -> list[Setting]:
    shapes = shapes_of(TEACHER, shape, per_axis)
    return grid_of(AblateConfig(**choices), TEACHER, shapes, 7, layers_given=layers_given)


def test_only_what_makes_a_difference_is_tried() -> None:
    """Counted by hand. Width: 9 pairs x 2 sites of activation, magnitude, 2 seeds of random."""
    assert len(grid(WIDTH, **MENU)) == 18 + 1 + 2
    # Depth and heads besides: x 2 metrics (activation alone) x 2 choices of layers x (none + 2 signs x 2 matrices).
    assert len(grid(ALL, **MENU)) == 18 * 2 * 2 * 5 + (1 + 2) * 2 * 5
    # Layers that are named are not chosen.
    assert len(grid(ALL, layers_given=True, **MENU)) == (18 + 1 + 2) * 5
    assert [row.layers for row in grid(TEACHER.replace(num_layers=3), layers=["scattered", "contiguous"])] == [""]
    depth = grid(TEACHER.replace(num_layers=2), **MENU)
    assert len(depth) == 2 * 2 + (1 + 2) * 2
    assert all(row.aggregation == row.neuron_site == row.head_residual == "" for row in depth)


def test_axes_by_themselves() -> None:
    shapes = shapes_of(TEACHER, ALL, per_axis=True)
    assert list(shapes) == ["student", "depth", "hidden", "ffn", "attention"]
    assert shapes["hidden"] == TEACHER.replace(hidden_size=32) and shapes["depth"] == TEACHER.replace(num_layers=2)
    assert list(shapes_of(TEACHER, TEACHER.replace(num_layers=2), per_axis=True)) == ["student"]
    sites = {row.shape: row.neuron_site for row in grid(ALL, per_axis=True)}
    assert sites == {
        **dict.fromkeys(["depth", "hidden", "attention"], ""),
        **dict.fromkeys(["student", "ffn"], sites["ffn"]),
    }


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"aggregations": ["l2/mean", "l2/max"]}, "aggregations[1]=l2/max must be one of mean/mean, mean/l2"),
        ({"methods": ["guess"]}, "methods[0]=guess must be one of activation, magnitude, random"),
        ({"methods": []}, "methods=[] is empty"),
        ({"neuron_sites": ["gate"]}, "neuron_sites[0]=gate must be one of"),
        ({"depth_metrics": ["perplexity"]}, "depth_metrics[0]=perplexity must be one of"),
        ({"layers": ["every second"]}, "layers[0]=every second must be one of"),
        ({"head_residuals": ["sum"]}, "head_residuals[0]=sum must be one of"),
        ({"residual_matrices": ["query+gate"]}, "residual_matrices[0]=query+gate must be names of"),
        ({"aggregations": ["l2/l2", "l2/l2"]}, "holds l2/l2 twice"),
        ({"random_seeds": 0}, "random_seeds=0 must be at least 1"),
    ],
)
def test_what_there_is_not_is_refused(choices: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as raised:
        grid(ALL, **choices)
    assert words in str(raised.value)


def test_no_student_is_refused() -> None:
    with refuses("prune.residual_matrices", ["key"], "holds key"):
        grid(ALL, head_residuals=["paper"], residual_matrices=["key"])
    with refuses("student", None, "asks for nothing smaller", "as in student.ffn_hidden_size=48"):
        shapes_of(TEACHER, TEACHER, per_axis=True)


def some_rows() -> list[Row]:
    rows = [Row(row, 5.0 - number / 7, 2.0, 1234) for number, row in enumerate(grid(WIDTH, aggregations=PAIRS))]
    return [*rows, Row(Setting("student", "random", seed="7"), 9.0, 3.0, 1234)]


def test_rows_are_read_back_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "ablation.csv"
    assert read_rows(path, "abc") == []
    write_rows(some_rows(), path, "abc")
    assert read_rows(path, "abc") == some_rows()
    with refuses("output", tmp_path, "holds ablation.csv with rows of another teacher"):
        read_rows(path, "abd")
    path.write_text("layer,loss\n1,2\n")
    with refuses("output", tmp_path, "holds ablation.csv, not the table of an ablation", "name another folder"):
        read_rows(path, "abc")


def test_table_square_and_plot(tmp_path: Path) -> None:
    rows = some_rows()
    lines = table(rows, 3.0).splitlines()
    assert lines[0].split() == [
        "method",
        "aggregation",
        "neuron_site",
        "seed",
        "lm",
        "loss",
        "over",
        "teacher",
        "parameters",
    ]
    assert lines[1].split()[1] == "var/var" and lines[-1].split()[0] == "random"
    assert [row.lm_loss for row in best_first(rows)] == sorted(row.lm_loss for row in rows)
    (square,) = squares(rows)
    assert square.splitlines()[1].split() == ["batch", "/", "sequence", "l2", "mean", "var"]
    assert square.splitlines()[3].split() == ["mean", *(f"{5 - number / 7:.4f}" for number in (3, 4, 5))]
    write_plot(rows, 3.0, tmp_path / "ablation.png")
    from matplotlib.image import imread

    assert imread(tmp_path / "ablation.png")[..., :3].std() > 0.01
