"""`minitron score` with layers left out: scores file, CSV and plot, at two layouts; what it refuses."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from minitron_mcore.importance.scores import TOLERANCE, load_scores
from tests.distributed.ranks import run_on_ranks
from tests.e2e.verbs import all_typed, run_well

LAYERS = 4
METRICS = ("lm_loss", "logit_mse", "normalized_logit_mse", "accuracy")
COMMON = [
    "score",
    "teacher.checkpoint=@/teacher",
    "tokenizer.model=@/tokenizer.model",
    "data.calibration=@/json_text_document",
    "data.sequence_length=32",
    "data.num_workers=0",
    "importance.num_samples=5",
    "importance.multiple_choice=@/task.jsonl",
]
DEPTH = ["importance.depth_metrics=[lm_loss,logit_mse,normalized_logit_mse,accuracy]", "importance.block_lengths=[1,2]"]
QUESTIONS: list[dict[str, Any]] = [
    {"context": "import ", "choices": ["json", "from", "class"], "answer": 0},
    {"context": "def encode(self", "choices": [", o):", " o )", ")"], "answer": ")"},
    {"context": "for key in", "choices": [" keys", " the"], "answer": 1},
    {"context": "return", "choices": [" None", " value"], "answer": 0},
]
# What is wrong beside DEPTH, and what must be said.
REFUSED: list[tuple[list[str], str]] = [
    (
        ["importance.depth_metrics=[perplexity]"],
        "importance.depth_metrics[0]=perplexity must be one of",
    ),
    (["importance.block_lengths=[4]"], "importance.block_lengths=[4] holds 4, but the model has 4 layers"),
    (["importance.block_lengths=[0]"], "importance.block_lengths[0]=0 must be at least 1"),
    (["importance.block_lengths=[]"], "importance.block_lengths=[] is empty"),
    (["importance.multiple_choice=null"], "holds accuracy, which needs questions: name a JSONL file"),
    (
        ["importance.depth_metrics=[lm_loss]"],
        "importance.multiple_choice=@/task.jsonl holds questions, but no metric needs them",
    ),
    (["importance.multiple_choice=@/none.jsonl"], "importance.multiple_choice=@/none.jsonl cannot be read"),
    (["importance.multiple_choice=@/empty.jsonl"], "importance.multiple_choice=@/empty.jsonl holds no questions"),
    (
        ["importance.multiple_choice=@/long.jsonl"],
        "importance.multiple_choice=@/long.jsonl, line 2 has",
    ),
    (["importance.multiple_choice=@/other.jsonl"], "was made in another way: importance.multiple_choice"),
]


def commanded(root: Path, *overrides: str) -> list[str]:
    return [text.replace("@", str(root)) for text in [*COMMON, *DEPTH, *overrides]]


@pytest.fixture(scope="module")
def root(corpus_with_teacher: Callable[[str], Path]) -> Path:
    root = corpus_with_teacher("depth")
    lines = [json.dumps(question) for question in QUESTIONS]
    (root / "task.jsonl").write_text("\n".join(lines) + "\n")
    (root / "other.jsonl").write_text(lines[0])
    (root / "empty.jsonl").touch()
    (root / "long.jsonl").write_text("\n".join([lines[0], json.dumps({**QUESTIONS[0], "context": "import " * 80})]))
    return root


@pytest.fixture(scope="module")
def shown(root: Path) -> str:
    """What the verb printed, at two layouts; checked below."""
    printed = run_well(*commanded(root, "scores=@/one.safetensors"))
    layout = ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "importance.micro_batch_size=2"]
    run_well(*commanded(root, "scores=@/two.safetensors", *layout), world_size=2)
    return printed


def read_csv(path: Path) -> list[dict[str, Any]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


def test_it_says_what_it_costs_and_what_it_found(root: Path, shown: str) -> None:
    assert (
        "score: depth: lm_loss, logit_mse, normalized_logit_mse: 8 passes (1 whole + 4 without 1 + 3 without 2) x 5 "
        "samples = 40 forward passes" in shown
    )
    assert "accuracy: 8 passes (1 whole + 4 without 1 + 3 without 2) x 10 choices of 4 questions = 80 forward" in shown
    assert "keeps final hidden states" in shown
    assert "without 1 layer (the first is 0):" in shown and "without 2 layers" in shown and "\n2-3 " in shown
    assert f"score: depth -> {root}/one.depth.csv, {root}/one.depth.png" in shown


def test_scores_file_csv_and_plot_agree_at_two_layouts(root: Path, shown: str) -> None:
    first, second = (load_scores(root / f"{name}.safetensors") for name in ("one", "two"))
    assert sorted(first.depth) == sorted(f"{metric}@{length}" for metric in METRICS for length in (1, 2))
    for name, values in first.depth.items():
        assert values.dtype == numpy.float64 and values.shape == (LAYERS + 1 - int(name[-1]),)
        assert abs(values - second.depth[name]).max() <= TOLERANCE["fp32"] * max(abs(values).max(), 1e-9), name
    assert first.settings["multiple_choice"] == second.settings["multiple_choice"]
    whole, *rows = read_csv(root / "one.depth.csv")
    assert [(row["length"], row["first_layer"], row["last_layer"]) for row in rows] == [
        *[("1", str(layer), str(layer)) for layer in range(4)],
        *[("2", str(layer), str(layer + 1)) for layer in range(3)],
    ]
    for row in rows:
        start, length = int(row["first_layer"]), int(row["length"])
        for metric in METRICS:
            assert float(row[metric]) == first.depth_of(metric, length)[start]
        assert float(row["block_influence"]) == pytest.approx(first.layers[start : start + length].sum(), rel=1e-12)
        assert float(row["lm_loss_without"]) == pytest.approx(float(whole["lm_loss_without"]) + float(row["lm_loss"]))
    for row in (whole, *rows):
        assert float(row["perplexity_without"]) == pytest.approx(math.exp(float(row["lm_loss_without"])), rel=1e-12)
        assert float(row["accuracy_without"]) * 4 == pytest.approx(round(float(row["accuracy_without"]) * 4))
    assert (float(whole["lm_loss_without"]), whole["lm_loss"]) == (pytest.approx(math.log(1003), abs=0.5), "")


def test_the_plot_is_one(root: Path, shown: str) -> None:
    from matplotlib.image import imread

    for name in ("one", "two"):
        picture = imread(root / f"{name}.depth.png")
        assert min(picture.shape[:2]) > 300 and picture[..., :3].std() > 0.01
    assert not list(root.glob("*.tmp"))


def test_bad_input_is_named_and_nothing_is_written(root: Path, shown: str) -> None:
    cases = [*REFUSED[:-1], (["scores=@/one.safetensors", *REFUSED[-1][0]], REFUSED[-1][1])]
    commands = [commanded(root, "scores=@/new", *overrides) for overrides, _ in cases]
    for (overrides, words), result in zip(cases, run_on_ranks(all_typed, 1, commands, root)[0], strict=True):
        code, said, untouched = result
        assert code == 2 and said.startswith("minitron score: ") and said.count("\n") == 1, (overrides, said)
        assert words.replace("@", str(root)) in said
        assert untouched, overrides
