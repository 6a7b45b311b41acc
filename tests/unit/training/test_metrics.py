"""Where a run's numbers go, read back from what lies on the disk."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.training.config import LogConfig
from minitron_mcore.training.metrics import WIDTH, MetricsLog, train_line, validation_line

ROWS: list[tuple[int, dict[str, float], str]] = [
    (10, {"consumed samples": 80, "lm loss": 2.5, "learning-rate": 1e-3, "grad-norm": 0.25}, "train"),
    (20, {"consumed samples": 160, "lm loss": 1.25, "learning-rate": 5e-4, "grad-norm": 0.125}, "train"),
    (20, {"lm loss validation": 1.5}, "validation"),
]


def log_rows(folder: Path, rows: list[Any], after: int = 0, **settings: Any) -> None:
    """What a process logs that goes on after iteration `after`."""
    log = LogConfig(**{"tensorboard": False, "wandb": "disabled", **settings})
    metrics = MetricsLog(folder, log, 20, name="test", recipe={"seed": 7})
    metrics.open(after)
    for iteration, row, kind in rows:
        metrics.write(iteration, row, shown=row, kind=kind)
    metrics.close()


def test_json_lines_are_appended_to(tmp_path: Path) -> None:
    log_rows(tmp_path, ROWS[:1])
    log_rows(tmp_path, ROWS[1:], after=10)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line.pop("iteration"), line.pop("kind"), line.pop("time") > 1.7e9) for line in lines] == [
        (10, "train", True),
        (20, "train", True),
        (20, "validation", True),
    ]
    assert lines == [row for _, row, _ in ROWS]


def test_a_line_is_there_once_it_is_written(tmp_path: Path) -> None:
    """A killed run has lost none of its lines."""
    metrics = MetricsLog(tmp_path, LogConfig(tensorboard=False, wandb="disabled"), 20, name="test", recipe={})
    metrics.open(0)
    metrics.write(1, {"lm loss": 2.0}, shown=None)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["lm loss"] == 2.0
    metrics.close()


def test_the_console_shows_a_loss_of_two_names_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fine-tuning logs its loss under the name that all alignment has and under that of a next-token loss: files and
    dashboards have both. Another loss than the next token's is shown beside it."""
    row = {"loss": 2.5, "lm loss": 2.5, "grad-norm": 0.25}
    held_out = {"loss validation": 1.5, "lm loss validation": 1.5, "ppl validation": 4.5}
    other = {"loss": 0.5, "lm loss": 2.25}
    log_rows(tmp_path, [(1, row, "train"), (1, held_out, "validation"), (2, other, "train")])
    assert capsys.readouterr().out.splitlines() == [
        " iteration  1/20 | loss: 2.500000 | grad-norm: 0.250 |",
        " validation at iteration 1 | loss validation: 1.500000 | ppl validation: 4.500000 |",
        " iteration  2/20 | loss: 0.500000 | lm loss: 2.250000 |",
    ]
    log_rows(tmp_path / "full", [(1, row, "train")], console="full")
    assert capsys.readouterr().out.count("2.500000") == 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["lm loss"] for line in lines if line["kind"] == "train"] == [2.5, 2.25]
    assert lines[1]["lm loss validation"] == 1.5


def test_the_console_shows_a_line_for_each_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"lm loss validation": 1.5, "lm loss validation wiki": 1.0, "ppl validation wiki": 2.5}
    log_rows(tmp_path, [(20, row, "validation")])
    assert capsys.readouterr().out.splitlines() == [
        " validation at iteration 20 | lm loss validation: 1.500000 |",
        " validation at iteration 20 | lm loss validation wiki: 1.000000 | ppl validation wiki: 2.500000 |",
    ]


STEP = {
    "consumed samples": 4000.0,
    "lm loss": 2.5,
    "logits distillation loss": 1.25,
    "teacher lm loss": 2.25,
    "top-1 agreement": 0.75,
    "embedding loss": 0.5,
    "learning-rate": 1e-3,
    "grad-norm": 0.25,
    "global batch size": 8.0,
    "number of skipped iterations": 0.0,
    "number of nan iterations": 0.0,
    "elapsed time per iteration (ms)": 12345.6,
    "throughput per GPU (TFLOP/s/GPU)": 312.5,
    "tokens per second": 25000.0,
    "peak memory (GiB)": 70.0,
    "tokens": 94_000_000_000.0,
    "time left": 187_384.4,
}


def test_a_training_line_can_be_read() -> None:
    line = train_line(500, 10000, STEP, full=False)
    assert line == (
        " iteration   500/10000 | tokens: 94.00B | elapsed time per iteration (ms): 12345.6 | time left: 2d 4:03:04 | "
        "learning-rate: 1.000E-03 | lm loss: 2.500000 | "
        "logits distillation loss: 1.250000 | grad-norm: 0.250 |"
    )
    plain = {name: value for name, value in STEP.items() if name != "logits distillation loss"}
    assert "| top-1 agreement: 0.7500 |" in train_line(500, 10000, plain, full=False), "there is room for it"
    assert len(train_line(500, 10000, plain, full=False)) <= WIDTH
    skipped = train_line(500, 10000, {**STEP, "number of skipped iterations": 2.0}, full=False)
    assert skipped.endswith("| number of skipped iterations: 2 |"), "as there is something to tell"


def test_a_line_of_preferences_has_what_users_look_for() -> None:
    rewards = {f"rewards/{name}": 0.25 for name in ("chosen", "rejected", "accuracies", "margins")}
    row = {"learning-rate": 1e-6, "loss": 0.5, "sft loss": 30.0, **rewards, "logps/chosen": -30.0, "grad-norm": 2.0}
    line = train_line(500, 10000, row, full=False)
    shown = "loss: 0.500000 | rewards/accuracies: 0.2500 | rewards/margins: 0.2500 | grad-norm: 2.000 |"
    assert line.startswith(f" iteration   500/10000 | learning-rate: 1.000E-06 | {shown}") and len(line) <= WIDTH
    line = validation_line(500, {f"{name} validation": value for name, value in row.items()}, full=False)
    assert "| loss validation: 0.500000 |" in line and "| rewards/accuracies validation: 0.250000 |" in line


def test_very_large_numbers_have_an_exponent() -> None:
    large = {**STEP, "lm loss": 1e20, "logits distillation loss": math.inf, "grad-norm": 3.4e38}
    line = train_line(500, 10000, large, full=False)
    assert line.endswith("| lm loss: 1.000E+20 | logits distillation loss: inf | grad-norm: 3.400E+38 |")
    assert validation_line(5, {"ppl validation": math.exp(40)}, full=False).endswith("| ppl validation: 2.354E+17 |")


def test_a_full_line_has_everything() -> None:
    line = train_line(500, 10000, STEP, full=True)
    assert all(f"| {name}: " in line for name in STEP)


def test_a_validation_line_has_what_is_looked_for() -> None:
    losses = ("lm loss", "logits distillation loss", "teacher lm loss", "top-1 agreement", "embedding loss", "ppl")
    row = {f"{name} validation": 1.0 for name in losses}
    line = validation_line(500, row, full=False)
    assert len(line) <= WIDTH and line.startswith(" validation at iteration 500 | lm loss validation: 1.000000 |")
    assert "| ppl validation: 1.000000 |" in line
    assert all(f"| {name}: " in validation_line(500, row, full=True) for name in row)


def test_a_rank_that_does_not_open_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = MetricsLog(tmp_path / "run", LogConfig(), 20, name="test", recipe={})
    metrics.write(1, {"lm loss": 2.0}, shown=None)
    metrics.close()
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_tensorboard(tmp_path: Path) -> None:
    """Two processes, the second goes on where the first had its checkpoint, are one curve."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_rows(tmp_path, [*ROWS[:1], (12, {"lm loss": 9.0}, "train")], tensorboard=True)
    log_rows(tmp_path, ROWS[1:], after=10, tensorboard=True)
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    curves = {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}
    assert curves["lm loss"] == [(10, 2.5), (20, 1.25)] and curves["lm loss validation"] == [(20, 1.5)]
    assert set(curves) == {"consumed samples", "lm loss", "learning-rate", "grad-norm", "lm loss validation"}


def test_killed_again_and_again_each_iteration_stands_once(tmp_path: Path) -> None:
    """Rows of every kind go that are after the checkpoint, the half of one that a kill leaves, and what it became."""

    def train(first: int, last: int) -> list[Any]:
        return [(step, {"lm loss": 10.0 - step}, "train") for step in range(first, last + 1)]

    file = tmp_path / "metrics.jsonl"
    log_rows(tmp_path, [*train(1, 7), (5, {"lm loss validation": 5.0}, "validation")])
    with file.open("a") as stream:
        stream.write('{"iteration": 6, "kind": "skipped", "time": 1.0, "samples": [3]}\n{"iteration": 8, "ki')
    log_rows(tmp_path, train(5, 6), after=4)
    log_rows(tmp_path, train(1, 3), after=0)
    with file.open("a") as stream:
        stream.write('{"iteration": 3, "ki{"iteration": 2, "kind": "train"}\n\n[4]\n')
    log_rows(tmp_path, [*train(4, 6), (5, {"lm loss validation": 5.0}, "validation")], after=3)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["iteration"], row["kind"]) for row in rows] == [
        *((step, "train") for step in range(1, 7)),
        (5, "validation"),
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl"}


def test_what_is_not_cut_is_not_written_again(tmp_path: Path) -> None:
    log_rows(tmp_path, ROWS)
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    log_rows(tmp_path, [], after=20)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    """JSON has no NaN: of a validation whose loss is none every reader still reads the line."""
    log_rows(tmp_path, [(10, {"lm loss validation": float("nan"), "ppl validation": float("inf")}, "validation")])

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=refuse)
    assert row["lm loss validation"] is None and row["ppl validation"] is None
