"""A real verb through both launchers: two iterations of `train` at TP = 2, one rank a node, two nodes."""

import json
from pathlib import Path

import pytest
import yaml

from tests.e2e.launchers import finish, free_port, run_sbatch, start_torchrun


@pytest.fixture(scope="module")
def recipe(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a tiny model, with its tokenizer and tokens made."""
    folder = tmp_path_factory.mktemp("data")
    sections = {
        "parallel": {"tensor": 2},
        "tokenizer": {"model": str(words / "tokenizer.model")},
        "data": {
            "train": str(words / "tokens_text_document"),
            "sequence_length": 16,
            "num_workers": 0,
            "split": "90,10,0",
        },
        "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}
        | {"num_query_groups": 2, "kv_channels": 8, "max_position_embeddings": 64, "rotary_base": 10000},
        "train": {"tokens": 128, "global_batch_size": 4, "micro_batch_size": 4, "eval_iters": 1},
        "log": {"interval": 1, "wandb": "disabled", "tensorboard": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


def losses(checkpoint: Path) -> list[float]:
    """Training losses by iteration, of a run that finished."""
    assert (checkpoint / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8").strip() == "2"
    lines = [json.loads(line) for line in (checkpoint / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["lm loss"] for line in lines if "lm loss" in line]


@pytest.mark.slow  # test_launch.py starts ranks by both; what DP2 trains is compared in test_training.py
def test_both_launchers_train_the_same_model(recipe: Path, tmp_path: Path) -> None:
    """The numbers do not depend on who started the ranks: equal to the last bit."""
    command = ["train", "--config", str(recipe)]
    nodes = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    arguments = [*command, f"train.checkpoint={tmp_path / 'torchrun'}"]
    finish([start_torchrun(arguments, NODE_RANK=str(node), **nodes) for node in range(2)])
    done = run_sbatch(tmp_path, [*command, f"train.checkpoint={tmp_path / 'slurm'}"], nodes=2, tasks_per_node=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses(tmp_path / "torchrun")) == 2
    assert losses(tmp_path / "torchrun") == losses(tmp_path / "slurm")
