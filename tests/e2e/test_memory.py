"""Memory that runs out, or cannot be enough, as the user meets it: what is said, the exit code, what is left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.ranks import run_on_ranks
from tests.e2e.verbs import all_run_well, command_on_rank, one_process_group

SMALL = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4} | {
    "num_query_groups": 2,
    "kv_channels": 8,
    "max_position_embeddings": 64,
    "rotary_base": 10000,
}


@pytest.fixture(scope="module")
def command(words: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`distill` of a tiny student from a tiny teacher; two iterations with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("data")
    sections = {
        "tokenizer": {"model": str(words / "tokenizer.model")},
        "data": {
            "train": str(words / "tokens_text_document"),
            "sequence_length": 16,
            "num_workers": 0,
            "split": "90,10,0",
        },
        "model": SMALL,
        "train": {"tokens": 64, "global_batch_size": 4, "micro_batch_size": 4, "eval_iters": 1},
        "teacher": {"checkpoint": str(folder / "teacher")},
        "student": {"checkpoint": str(folder / "student")},
        "distill": {"tokens": 128, "global_batch_size": 4, "micro_batch_size": 4, "eval_iters": 1, "save_interval": 1},
        "log": {"interval": 1, "wandb": "disabled", "tensorboard": False, "timing_log_level": 2},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    train = ["train", "--config", str(path)]
    all_run_well(
        [
            [*train, f"train.checkpoint={folder / 'teacher'}", "model.hidden_size=48"],
            [*train, f"train.checkpoint={folder / 'student'}"],
        ]
    )
    return ["distill", "--config", str(path)]


def starved(command: list[str], when: int, kind: str) -> list[tuple[int, str]]:
    """The command with no memory left at iteration `when` (or at loading), then the same command again."""
    import torch

    from minitron_mcore.runtime import start
    from minitron_mcore.stages import train
    from minitron_mcore.training import loop

    steps = 0
    train_step, device_memory, load_weights = loop.train_step, start.device_memory, train.load_weights
    exhausted = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def hungry(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == when and kind == "cuda":
            raise exhausted
        if steps == when:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: you tried"
            )
        return train_step(*arguments)

    def full(*_: Any) -> None:
        raise exhausted

    if kind == "loading":
        train.load_weights = full  # type: ignore[assignment]
    elif kind == "small":
        start.device_memory = lambda local_ranks: (2**16, 2**16)
    elif kind == "tight":
        start.device_memory = lambda local_ranks: (2**20, 2**40)
    else:
        loop.train_step = hungry  # type: ignore[assignment]
    with one_process_group():
        try:
            first = command_on_rank(command)
        finally:
            loop.train_step, start.device_memory, train.load_weights = train_step, device_memory, load_weights
        return [first, command_on_rank(command)]


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_what_helps_is_said(command: list[str], kind: str, tmp_path: Path) -> None:
    """Nothing of the checkpoint before it is lost: the same command goes on."""
    folder = tmp_path / "distilled"
    (code, shown), (again, resumed) = run_on_ranks(
        starved, 1, [*command, f"distill.checkpoint={folder}"], when=2, kind=kind
    )[0]
    assert code == 1 and "Traceback" not in shown
    told = shown[shown.index("minitron distill: out of memory while training: ") :]
    assert "the forecast of a rank:" in told and "  teacher weights" in told and "  together" in told
    helps = told[told.index("what helps most:") :].splitlines()[1:]
    assert len(helps) == 3 and all(" saves " in line and "B" in line for line in helps)
    assert any("distill.micro_batch_size=1" in line for line in helps)
    assert again == 0 and f"resumed {folder} at iteration 1 of 2" in resumed
    assert "teacher: weights finite and filled, loss" in shown
    assert "memory of a rank: forecast" in shown


def test_what_helps_is_said_while_loading(command: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "distilled"
    (code, shown), (again, _) = run_on_ranks(
        starved, 1, [*command, f"distill.checkpoint={folder}"], when=0, kind="loading"
    )[0]
    assert code == 1 and "Traceback" not in shown
    told = shown[shown.index("minitron distill: out of memory while loading: ") :]
    assert "the forecast of a rank:" in told and "what helps most:" in told
    assert again == 0


def test_a_teacher_that_nothing_holds_is_refused(command: list[str], tmp_path: Path) -> None:
    """By name, with exit code 2, before a weight is read; and nothing is written."""
    (code, shown), (again, _) = run_on_ranks(
        starved, 1, [*command, f"distill.checkpoint={tmp_path / 'distilled'}"], when=0, kind="small"
    )[0]
    assert code == 2 and "minitron distill: distill needs" in shown and "teacher weights" in shown
    assert "a rank has 64.0 KiB: change parallel.*, teacher.placement or the number of ranks" in shown
    assert again == 0


def test_less_than_is_needed_is_a_warning(command: list[str], tmp_path: Path) -> None:
    (code, shown), _ = run_on_ranks(
        starved, 1, [*command, f"distill.checkpoint={tmp_path / 'distilled'}"], when=0, kind="tight"
    )[0]
    assert code == 0 and "WARNING: the forecast exceeds the free memory" in shown and "saves" in shown


def test_the_split_is_logged(command: list[str], tmp_path: Path) -> None:
    """Every part of the step at every line, in the file and on the console; the shares add up to 1."""
    folder = tmp_path / "distilled"
    (code, shown), _ = run_on_ranks(starved, 1, [*command, f"distill.checkpoint={folder}"], when=0, kind="none")[0]
    assert code == 0, shown
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    row = next(row for row in rows if row["kind"] == "train" and row["iteration"] == 2)
    parts = [*("batch-generator", "teacher-forward", "forward-compute", "logits-loss", "backward-compute")]
    parts += ["communication", "optimizer", "other"]
    assert sum(row[f"{part}-share"] for part in parts) == pytest.approx(1.0)
    assert sum(row[f"{part}-time"] for part in parts) == pytest.approx(row["elapsed time per iteration (ms)"])
    assert all(row[f"{part}-time"] > 0 for part in parts)
    assert row["peak memory (GiB)"] > 0.05 and row["number of skipped iterations"] == 0
    assert row["teacher throughput per GPU (TFLOP/s/GPU)"] > 0
    assert shown.count(" time of an iteration (ms, slowest rank; share of all) | batch-generator: ") == 2
