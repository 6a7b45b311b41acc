"""Where a run's numbers go, read back from what lies on the disk."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.errors import InputError
from minitron_mcore.training.config import LogConfig
from minitron_mcore.training.metrics import MetricsLog, check_log

ROWS: list[tuple[int, dict[str, float], str]] = [
    (10, {"consumed samples": 80, "lm loss": 2.5, "learning-rate": 1e-3, "grad-norm": 0.25}, "train"),
    (20, {"consumed samples": 160, "lm loss": 1.25, "learning-rate": 5e-4, "grad-norm": 0.125}, "train"),
    (20, {"lm loss validation": 1.5}, "validation"),
]


def log_rows(folder: Path, rows: list[Any], **settings: Any) -> None:
    log = LogConfig(**{"tensorboard": False, "wandb": "disabled", **settings})
    metrics = MetricsLog(folder, log, name="test", recipe={"seed": 7})
    metrics.open()
    for iteration, row, kind in rows:
        metrics.write(iteration, 20, row, shown=row, kind=kind)
    metrics.close()


def test_json_lines_are_appended_to(tmp_path: Path) -> None:
    log_rows(tmp_path, ROWS[:1])
    log_rows(tmp_path, ROWS[1:])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line.pop("iteration"), line.pop("kind"), line.pop("time") > 1.7e9) for line in lines] == [
        (10, "train", True),
        (20, "train", True),
        (20, "validation", True),
    ]
    assert lines == [row for _, row, _ in ROWS]


def test_a_line_is_there_once_it_is_written(tmp_path: Path) -> None:
    """A killed run has lost none of its lines."""
    metrics = MetricsLog(tmp_path, LogConfig(tensorboard=False, wandb="disabled"), name="test", recipe={})
    metrics.open()
    metrics.write(1, 20, {"lm loss": 2.0}, shown=None)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["lm loss"] == 2.0
    metrics.close()


def test_the_console_shows_a_line_for_each_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"lm loss validation": 1.5, "lm loss validation wiki": 1.0, "ppl validation wiki": 2.5}
    log_rows(tmp_path, [(20, row, "validation")])
    assert capsys.readouterr().out.splitlines() == [
        " validation at iteration 20 | lm loss validation: 1.500000 |",
        " validation at iteration 20 | lm loss validation wiki: 1.000000 | ppl validation wiki: 2.500000 |",
    ]


def test_the_console_shows_megatrons_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log_rows(tmp_path, ROWS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        " iteration       10/      20 | consumed samples:        80 | learning-rate: 1.000E-03 | lm loss: 2.500000 | "
        "grad-norm: 0.250 |"
    )
    assert lines[2] == " validation at iteration 20 | lm loss validation: 1.500000 |"


def test_a_rank_that_does_not_open_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = MetricsLog(tmp_path / "run", LogConfig(), name="test", recipe={})
    metrics.write(1, 20, {"lm loss": 2.0}, shown=None)
    metrics.close()
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_tensorboard(tmp_path: Path) -> None:
    """Two runs, the second a resumed one, are one curve."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_rows(tmp_path, ROWS[:1], tensorboard=True)
    log_rows(tmp_path, ROWS[1:], tensorboard=True)
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    curves = {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}
    assert curves["lm loss"] == [(10, 2.5), (20, 1.25)] and curves["lm loss validation"] == [(20, 1.5)]
    assert set(curves) == {"consumed samples", "lm loss", "learning-rate", "grad-norm", "lm loss validation"}


def test_wandb_offline_goes_on_under_its_id(tmp_path: Path) -> None:
    log_rows(tmp_path, ROWS[:1], wandb="offline")
    log_rows(tmp_path, ROWS[1:], wandb="offline")
    run_id = (tmp_path / "wandb_run_id").read_text()
    deadline = time.monotonic() + 20  # another process writes the files
    while time.monotonic() < deadline:
        files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
        if sum(len(history(path)) for path in files) == 2:
            break
        time.sleep(0.2)
    assert {path.name for path in files} == {f"run-{run_id}.wandb"}
    assert [row for path in files for row in history(path)] == [
        {"_step": 10, **ROWS[0][1]},
        {"_step": 20, **ROWS[1][1], **ROWS[2][1]},
    ]


def history(path: Path) -> list[dict[str, float]]:
    """The rows in a wandb run file: a header of 7 bytes, then records as in a LevelDB log, each a protobuf message."""
    from wandb.proto import wandb_internal_pb2

    content, rows, position = path.read_bytes(), [], 7
    assert content.startswith(b":W&B") and len(content) < 1 << 15, "one block, so that no record is split"
    while position < len(content):
        _, length, kind = struct.unpack_from("<IHB", content, position)
        assert kind == 1, "a whole record"
        record = wandb_internal_pb2.Record.FromString(content[position + 7 : position + 7 + length])  # type: ignore[attr-defined]
        position += 7 + length
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({key: value for key, value in items.items() if key == "_step" or not key.startswith("_")})
    return rows


def test_wandb_online_without_a_login_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"log\.wandb=online is refused by Weights & Biases .*log\.wandb=offline"):
        log_rows(tmp_path / "run", ROWS, wandb="online")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "wandb_run_id").exists()
    with pytest.raises(InputError, match=r"log\.wandb=online needs an API key: .*log\.wandb=offline"):
        check_log(LogConfig(wandb="online"))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    check_log(LogConfig(wandb="online"))


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    """JSON has no NaN: of a validation whose loss is none every reader still reads the line."""
    log_rows(tmp_path, [(10, {"lm loss validation": float("nan"), "ppl validation": float("inf")}, "validation")])

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=refuse)
    assert row["lm loss validation"] is None and row["ppl validation"] is None
