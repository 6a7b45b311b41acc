"""A training whose rank, or node, is killed goes on by torchrun's own restarts, and ends with the losses of one that
nothing happened to."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from tests.e2e.launchers import ROOT, environment, free_port, start_torchrun

STEPS = 40
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # every start imports torch and megatron-core on each rank


@pytest.fixture(scope="module")
def recipe(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sections = {
        "tokenizer": {"model": str(words / "tokenizer.model")},
        "data": {
            "train": str(words / "tokens_text_document"),
            "sequence_length": 16,
            "num_workers": 0,
            "split": "1",
        },
        "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}
        | {"max_position_embeddings": 64, "rotary_base": 10000},
        "train": {"tokens": STEPS * 64, "global_batch_size": 4, "micro_batch_size": 2, "eval_iters": 0}
        | {"save_interval": 5, "lr": 1e-2},
        "log": {"interval": 1, "tensorboard": False},
    }
    path = tmp_path_factory.mktemp("elastic") / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "train"]
    assert [row["iteration"] for row in rows] == list(range(1, STEPS + 1))
    return [row["lm loss"] for row in rows]


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("undisturbed")
    arguments = ["train", "--config", str(recipe), f"train.checkpoint={folder}"]
    agent = start_torchrun(arguments, NPROC_PER_NODE="2")
    said = agent.communicate(timeout=300)[0]
    assert agent.returncode == 0, said
    return losses(folder)


def wait_for(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not there():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def saved(folder: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int((folder / "latest_checkpointed_iteration.txt").read_text())
    return 0


def ranks_of(agent: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    found = {}
    for child in psutil.Process(agent.pid).children():
        with contextlib.suppress(psutil.Error):
            found[child.environ().get("RANK", "")] = child
    return found


def test_a_killed_rank(recipe: Path, undisturbed: list[float], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    arguments = ["train", "--config", str(recipe), f"train.checkpoint={folder}"]
    agent = start_torchrun(arguments, NPROC_PER_NODE="2", MAX_RESTARTS="1")
    wait_for(lambda: saved(folder) >= 10, agent)
    ranks_of(agent)["1"].kill()
    said = agent.communicate(timeout=300)[0]
    assert agent.returncode == 0, said
    assert "all ranks are started again (restart 1 of 1)" in said and f"resumed {folder} at iteration " in said
    assert losses(folder) == undisturbed


def test_a_lost_node(recipe: Path, undisturbed: list[float], tmp_path: Path) -> None:
    """Two nodes of a rank each; the second one is killed, agent and all, and the first goes on alone."""
    folder = tmp_path / "checkpoint"
    arguments = ["train", "--config", str(recipe), f"train.checkpoint={folder}", f"train.tokens={STEPS * 64}"]
    nodes = {"NNODES": "1:2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    env = environment(MAX_RESTARTS="3", LAST_CALL_SECONDS="15", **nodes)
    agents = []
    for node in range(2):
        command = [str(ROOT / "launch" / "torchrun.sh"), *arguments]
        with (tmp_path / f"node{node}.log").open("w") as log:
            agents.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
                )
            )
        if node == 0:
            time.sleep(1)  # the first one holds the rendezvous
    try:
        wait_for(lambda: saved(folder) >= 5, agents[0])
        assert all(len(ranks_of(agent)) == 1 for agent in agents), "both nodes train"
        for child in psutil.Process(agents[1].pid).children():
            child.kill()
        os.killpg(agents[1].pid, signal.SIGKILL)
        assert agents[0].wait(timeout=300) == 0, (tmp_path / "node0.log").read_text()
    finally:
        for agent in agents:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
    assert "all ranks are started again" in (tmp_path / "node0.log").read_text()
    # One rank adds the same numbers in another order.
    assert losses(folder) == pytest.approx(undisturbed, rel=1e-5)
