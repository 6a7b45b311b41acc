"""A rank that hangs ends the job, with a table that names it, and the same command goes on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import yaml

from minitron_mcore.runtime.interrupt import HUNG
from tests.e2e.launchers import start_ranks

LIMIT = 6.0  # seconds


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
        "model": {"num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 16, "num_attention_heads": 2}
        | {"max_position_embeddings": 64, "rotary_base": 10000},
        "train": {"tokens": 10**8, "global_batch_size": 4, "micro_batch_size": 2, "eval_iters": 0, "save_interval": 0},
        "log": {"interval": 1, "tensorboard": False},
        "watch": {"hang_minutes": LIMIT / 60, "quiet_minutes": 5},
    }
    path = tmp_path_factory.mktemp("hung") / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("how", "hung"),
    [
        ("holding", 1),
        pytest.param("waiting", 1, marks=pytest.mark.slow),
        pytest.param("stopped", 1, marks=pytest.mark.slow),
        pytest.param("holding", 0, marks=pytest.mark.slow),
    ],
)
def test_a_hung_rank_ends_the_job(how: str, hung: int, recipe: Path, tmp_path: Path) -> None:
    """Without a launcher, so that it is the ranks themselves that end it; the first one holds the store."""
    arguments = [how, "train", "--config", str(recipe), f"train.checkpoint={tmp_path}/checkpoint"]
    ranks = start_ranks(arguments, tmp_path / "logs", 2, "tests.e2e.hung_at", HUNG_RANK=str(hung))
    try:
        codes = [rank.wait(timeout=150) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    said = [(tmp_path / "logs" / f"rank{rank}.log").read_text() for rank in range(2)]
    assert codes[1 - hung] == HUNG, said
    # One that cannot end itself is ended by the other.
    assert codes[hung] == (HUNG if how == "waiting" else -signal.SIGKILL), said
    other = said[1 - hung]
    assert f"rank {1 - hung} stands at:" in other and "train_step" in other.split("stands at:")[1]
    assert "minitron train: no rank has gone on for " in other and f"; rank {hung} on " in other
    table = [line.split() for line in other.split(f"; rank {hung} on ")[1].splitlines()[2:4]]
    assert [(row[0], row[2]) for row in table] == [(str(hung), "train"), (str(1 - hung), "train")]
    if how == "waiting":
        assert "hang(" not in other and "in hang" in said[1] and "stood still first" in other
        assert table[0][3:5] == ["3", "batch-generator"]
    else:
        assert "no longer answers" in other and "stopped," in table[0]
