"""train, prune, distill and evaluate as typed, at `parallel.context=2`: the numbers of one rank.

Losses in fp32 agree to 1e-5 (relative): the same sums in another order. The student that `prune` writes is compared
through what is trained from it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.e2e.verbs import all_run_well


@pytest.fixture(scope="module")
def config(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    sections = {
        "tokenizer": {"model": str(words / "tokenizer.model")},
        "data": {
            "train": str(words / "tokens_text_document"),
            "sequence_length": 16,
            "num_workers": 0,
            "split": "80,20,0",
        },
        "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}
        | {"num_query_groups": 2, "kv_channels": 8, "max_position_embeddings": 64, "init_method_std": 0.2},
        "train": {"tokens": 192, "global_batch_size": 4, "micro_batch_size": 2, "eval_iters": 1},
        "distill": {"tokens": 192, "global_batch_size": 4, "micro_batch_size": 2, "eval_iters": 1, "kd_weight": 1.0},
        "student": {"ffn_hidden_size": 32},
        "importance": {"method": "magnitude"},
        "evaluate": {"samples": 4},
        "log": {"interval": 1, "wandb": "disabled", "tensorboard": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


def road(config: Path, folder: Path, world_size: int, *layout: str) -> dict[str, list[float]]:
    """Teacher, scores, student, distilled student, its evaluation; every loss on the way."""
    checkpoints = {name: folder / name for name in ("teacher", "student", "distilled")}
    keys = [
        f"train.checkpoint={checkpoints['teacher']}",
        f"teacher.checkpoint={checkpoints['teacher']}",
        f"student.checkpoint={checkpoints['student']}",
        f"distill.checkpoint={checkpoints['distilled']}",
        f"checkpoint={checkpoints['distilled']}",
        f"scores={folder / 'scores.safetensors'}",
        *layout,
    ]
    verbs = ("train", "score", "prune", "distill", "evaluate")
    all_run_well([[verb, "--config", str(config), *keys] for verb in verbs], world_size)
    found: dict[str, list[float]] = {}
    for name in ("teacher", "distilled"):
        lines = (checkpoints[name] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        for line in map(json.loads, lines):
            for key, value in line.items():
                if "loss" in key:
                    found.setdefault(f"{name} {key}", []).append(value)
    results = json.loads((checkpoints["distilled"] / "results.json").read_text(encoding="utf-8"))
    return {**found, "evaluated": [results["lm loss"]]}


def test_the_road_is_the_same_with_sequences_cut_in_two(config: Path, tmp_path: Path) -> None:
    whole = road(config, tmp_path / "whole", 1)
    cut = road(config, tmp_path / "cut", 2, "parallel.context=2", "teacher.placement=sharded")
    assert len(whole["distilled logits distillation loss"]) == len(whole["teacher lm loss"]) == 3
    assert set(cut) == set(whole)
    for name, values in whole.items():
        assert cut[name] == pytest.approx(values, rel=1e-5), name
