"""`minitron train` as a process of its own: killed while it saves, ended by Ctrl-C and SIGTERM, still the whole run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from minitron_mcore.checkpoint.folder import latest_iteration
from tests import warm
from tests.distributed.ranks import run_on_ranks
from tests.e2e.launchers import environment

STEPS = 12


@pytest.fixture(scope="module")
def recipe(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("killed")
    sections: dict[str, dict[str, Any]] = {
        "tokenizer": {"model": str(corpus / "tokenizer.model")},
        "data": {
            "num_workers": 2,
            "split": "1",
            "train": str(corpus / "email_text_document"),
            "sequence_length": 32,
        },
        "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}
        | {"num_query_groups": 2, "max_position_embeddings": 64, "rotary_base": 10000},
        "train": {"tokens": STEPS * 8 * 32, "micro_batch_size": 4, "lr": 1e-2, "save_interval": 1, "eval_iters": 0},
        "log": {"interval": 1, "wandb": "disabled"},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(sections))
    return root / "recipe.yaml"


def arguments(recipe: Path, folder: Path) -> list[str]:
    return ["train", "--config", str(recipe), f"train.checkpoint={folder}"]


def start(recipe: Path, folder: Path, log: Path) -> warm.Process:
    return warm.start("minitron_mcore", arguments(recipe, folder), output=log, env=environment())


def wait_until(process: warm.Process, what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while not what():
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.001)


def members(group: int) -> list[str]:
    """The command lines of a process group's processes that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(path.with_name("cmdline").read_text().replace("\0", " "))
    return found


def train_on_rank(commands: list[list[str]], folders: list[str]) -> list[dict[str, torch.Tensor]]:
    """Run the commands; the final weights and optimizer states in the folders."""
    from megatron.core import dist_checkpointing

    from minitron_mcore.cli import main
    from minitron_mcore.runtime.start import start

    for command in commands:
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(command) == 0, command
    start()
    states = [dist_checkpointing.load_plain_tensors(f"{folder}/iter_{STEPS:07d}") for folder in folders]
    return [{key: value for key, value in state.items() if isinstance(value, torch.Tensor)} for state in states]


def losses(folder: Path) -> dict[int, tuple[float, float]]:
    """By iteration; each stands there once, whatever was done again."""
    rows = list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))
    assert len({row["iteration"] for row in rows}) == len(rows)
    return {row["iteration"]: (row["lm loss"], row["grad-norm"]) for row in rows}


def test_killed_and_terminated(recipe: Path, tmp_path: Path) -> None:
    folder, whole = tmp_path / "stopped", tmp_path / "whole"
    tracker = folder / "latest_checkpointed_iteration.txt"

    # kill -9 while iteration 3 or a later one is being written
    process, log = start(recipe, folder, tmp_path / "killed.log"), tmp_path / "stopped.log"
    wait_until(process, lambda: tracker.exists() and int(tracker.read_text()) >= 2)
    wait_until(process, lambda: any(folder.glob(".unfinished_iter_*")))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 10  # for the processes that write to end
    while (left := members(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, "a killed run leaves no process behind"
    killed_at = latest_iteration(folder)
    assert killed_at is not None and 2 <= killed_at < STEPS - 5

    # The same command goes on. Ctrl-C saves, and SIGTERM, as SLURM sends it before a time limit; readers get both.
    stopped_at = killed_at
    for number, code, name in ((signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 200, "SIGTERM")):
        before, process = stopped_at, start(recipe, folder, log)
        wait_until(process, lambda: int(tracker.read_text()) > before)  # noqa: B023
        os.killpg(process.pid, number)
        process.wait(timeout=60)
        shown = log.read_text()
        newest = latest_iteration(folder)
        assert process.returncode == code and newest is not None and before < newest < STEPS, shown
        stopped_at = newest
        assert f"resumed {folder} at iteration {before} of {STEPS}" in shown
        assert f"{name}: saved {folder} at iteration {stopped_at} of {STEPS}; the same command goes on" in shown
        assert "Traceback" not in shown

    commands = [arguments(recipe, path) for path in (folder, whole)]
    resumed, uninterrupted = run_on_ranks(train_on_rank, 1, commands, [str(folder), str(whole)])[0]
    assert losses(folder) == losses(whole) and sorted(losses(whole)) == list(range(1, STEPS + 1))
    assert resumed.keys() == uninterrupted.keys() and len(resumed) > 10
    for key, value in uninterrupted.items():
        torch.testing.assert_close(resumed[key], value, rtol=0, atol=0, msg=key)
    assert not list(folder.glob(".unfinished*"))
    assert curve(folder) == curve(whole), "TensorBoard has lost nothing"


def curve(folder: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    events = accumulator.Scalars("lm loss")
    assert len({event.step for event in events}) == len(events)
    return {event.step: event.value for event in events}
