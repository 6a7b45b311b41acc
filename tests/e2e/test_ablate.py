"""`minitron ablate`: the losses of `prune` and `evaluate`, at every layout; rows once made stay; refusals."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_on_ranks
from tests.e2e.verbs import all_run_well, all_typed, run_well

COMMON = [
    "teacher.checkpoint=@/teacher",
    "tokenizer.model=@/tokenizer.model",
    "data.train=@/json_text_document",
    "data.valid=@/json_text_document",
    "data.sequence_length=32",
    "data.num_workers=0",
    "importance.num_samples=6",
    "evaluate.samples=9",
    "evaluate.micro_batch_size=2",
    "student.num_layers=2",
    "student.ffn_hidden_size=64",
]
GRID = [
    "ablate.aggregations=[l2/mean,mean/mean,l2/var,mean/var]",
    "ablate.methods=[activation,magnitude,random]",
    "ablate.layers=[contiguous]",
    "ablate.depth_metrics=[lm_loss]",
]
# A student of two layers on two stages: one of its layers is cut on another stage than it goes to.
LAYOUTS = {"two": ["parallel.tensor=2", "parallel.sequence=true"], "three": ["parallel.pipeline=2"]}
REFUSED: list[tuple[list[str], str]] = [
    (["ablate.aggregations=[l2/max]"], "ablate.aggregations[0]=l2/max must be one of"),
    (
        ["ablate.methods=[guess]"],
        "ablate.methods[0]=guess must be one of activation, magnitude, random",
    ),
    (
        ["student.num_layers=null", "student.ffn_hidden_size=null"],
        "student asks for nothing smaller than the teacher: set student.layers",
    ),
    (["student.hidden_size=4800"], "student.hidden_size=4800 is larger than the teacher's 48"),
    (["output=null"], "output is not given"),
    (["teacher.checkpoint=@/none"], "teacher.checkpoint=@/none is not there"),
    (
        ["ablate.depth_metrics=[accuracy]"],
        "ablate.depth_metrics=[accuracy] holds accuracy, which needs questions",
    ),
    (["importance.num_samples=100000"], "importance.num_samples=100000 is more than the"),
    (["evaluate.samples=8", "output=@/one"], "output=@/one holds ablation.csv with rows of another teacher, student"),
    (["ablate.aggregation=[l2/l2]"], "is not a key of a recipe: the nearest is ablate.aggregations"),
]


def commanded(root: Path, verb: str, *overrides: str) -> list[str]:
    return [verb, *(text.replace("@", str(root)) for text in [*COMMON, *overrides])]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def root(corpus_with_teacher: Callable[[str], Path]) -> Path:
    return corpus_with_teacher("ablate")


@pytest.fixture(scope="module")
def shown(root: Path) -> str:
    printed = run_well(*commanded(root, "ablate", *GRID, "output=@/one"))
    for name, layout in LAYOUTS.items():
        run_well(*commanded(root, "ablate", *GRID, f"output=@/{name}", *layout), world_size=2)
    return printed


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_losses(name: str, root: Path, shown: str) -> None:
    """fp32, to 1e-5: another order of sums."""
    first, second = (rows_of(root / folder / "ablation.csv") for folder in ("one", name))
    assert len(first) == len(second) == 4 + 2
    for here, there in zip(first, second, strict=True):
        assert float(here.pop("lm_loss")) == pytest.approx(float(there.pop("lm_loss")), abs=1e-5)
        assert float(here.pop("ppl")) == pytest.approx(float(there.pop("ppl")), rel=1e-5)
        assert here == there


def test_a_row_is_what_prune_and_evaluate_give(root: Path, shown: str) -> None:
    """By way of files, at another layout."""
    choice = ["importance.batch_aggregation=mean", "importance.sequence_aggregation=var"]
    depth = ["importance.depth_metrics=[lm_loss]", "importance.block_lengths=[2]"]
    layers = ["prune.layers=contiguous", "prune.depth_metric=lm_loss", "student.checkpoint=@/pruned"]
    commands = [
        commanded(root, "score", "scores=@/scores.safetensors", *choice, *depth),
        commanded(root, "prune", "scores=@/scores.safetensors", *layers),
        commanded(root, "evaluate", "checkpoint=@/pruned", "results=@/results.json"),
    ]
    all_run_well([[*command, "parallel.pipeline=2"] for command in commands], world_size=2)
    (row,) = [row for row in rows_of(root / "one" / "ablation.csv") if row["aggregation"] == "mean/var"]
    results: dict[str, Any] = json.loads((root / "results.json").read_text())
    assert float(row["lm_loss"]) == pytest.approx(results["lm loss"], abs=1e-5)
    assert int(row["parameters"]) == results["parameters"]


def test_table_square_and_plot_are_there(root: Path, shown: str) -> None:
    from matplotlib.image import imread

    losses = sorted(float(row["lm_loss"]) for row in rows_of(root / "one" / "ablation.csv"))
    body = shown.split("over teacher")[1].splitlines()[1:7]
    assert [line.split()[-3] for line in body] == [f"{loss:.4f}" for loss in losses]
    assert "batch / sequence" in shown and "6 students" in shown
    assert imread(root / "one" / "ablation.png")[..., :3].std() > 0.01
    assert not list((root / "one").glob("*.tmp"))


def test_finished_rows_are_not_made_again(root: Path, shown: str) -> None:
    before = rows_of(root / "two" / "ablation.csv")
    larger = [*GRID[1:], "ablate.aggregations=[l2/mean,mean/mean,l2/var,mean/var,var/var]", "output=@/two"]
    printed = run_well(*commanded(root, "ablate", *larger))
    assert "7 students" in printed and "6 done before" in printed and "[1/1]" in printed
    after = rows_of(root / "two" / "ablation.csv")
    assert after[:-1] == before and after[-1]["aggregation"] == "var/var"
    again = run_well(*commanded(root, "ablate", *larger))
    assert "7 done before" in again and "score:" not in again


def test_shares_are_gathered(root: Path, shown: str) -> None:
    """Jobs that each evaluate a share write a table of their own; the one after them computes nothing."""
    shares = [commanded(root, "ablate", *GRID, "output=@/shares", f"ablate.share={number}/2") for number in (1, 0)]
    all_run_well(shares)
    assert not (root / "shares" / "ablation.csv").exists()
    said = run_well(*commanded(root, "ablate", *GRID, "output=@/shares"))
    assert "6 done before" in said and "[1/" not in said
    whole, gathered = (rows_of(root / name / "ablation.csv") for name in ("one", "shares"))
    assert sorted(map(str, gathered)) == sorted(map(str, whole))


def test_bad_input_is_named_and_nothing_is_written(root: Path, shown: str) -> None:
    commands = [commanded(root, "ablate", "output=@/new", *overrides) for overrides, _ in REFUSED]
    for (overrides, words), result in zip(REFUSED, run_on_ranks(all_typed, 1, commands, root)[0], strict=True):
        code, said, untouched = result
        assert code == 2 and said.startswith("minitron ablate: ") and said.count("\n") == 1, (overrides, said)
        assert words.replace("@", str(root)) in said, said
        assert untouched, overrides
