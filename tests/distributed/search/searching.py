"""A search over three small candidates inside `run_on_ranks`, and what it leaves."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.distributed.models import tiny

# Of the tiny teacher: 4 layers, hidden 48, ffn 96, 6 heads in 2 groups.
SHAPES: list[dict[str, int]] = [{"ffn_hidden_size": 64}, {"num_layers": 3}, {"hidden_size": 36}]
NAMES = ["l4-h48-f64-q6-g2", "l3-h48-f96-q6-g2", "l4-h36-f96-q6-g2"]
BATCH = 4 * 32  # tokens of a step
COMMON = [
    "teacher.checkpoint=@/teacher",
    "tokenizer.model=@/tokenizer.model",
    "data.train=@/email_text_document",
    "data.valid=@/json_text_document",
    "data.sequence_length=32",
    "data.num_workers=0",
    "importance.num_samples=6",
    "evaluate.samples=8",
    "evaluate.micro_batch_size=2",
    "distill.global_batch_size=4",
    "distill.micro_batch_size=1",
    "distill.lr=1e-2",
    "distill.lr_warmup_iters=1",
    "distill.eval_iters=1",
    f"distill.tokens={8 * BATCH}",
    f"search.tokens={4 * BATCH}",
    "log.wandb=disabled",
    "log.tensorboard=false",
]


def recipe_of(root: Path, overrides: Sequence[str]) -> Any:
    from minitron_mcore.recipe import load_recipe

    return load_recipe(None, [text.replace("@", str(root)) for text in [*COMMON, *overrides]])


def trials_of(root: Path, folder: Path, overrides: Sequence[str], world: Any, shapes: Sequence[dict[str, int]]) -> Any:
    from minitron_mcore.jobs.job import NOTHING
    from minitron_mcore.jobs.trials import resolve_trials
    from minitron_mcore.search.candidates import Candidate

    candidates = [Candidate(tiny("llama", **shape), {}) for shape in shapes]
    return resolve_trials(recipe_of(root, overrides), world, NOTHING, candidates, folder)


def search_on_rank(
    root: Path, folder: Path, overrides: Sequence[str] = (), shapes: Sequence[dict[str, int]] = SHAPES
) -> tuple[list[dict[str, Any]], str]:
    """The results, best first, and what was printed."""
    import os

    from minitron_mcore.runtime.start import start
    from minitron_mcore.runtime.world import read_world
    from minitron_mcore.stages import trials

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        job = trials_of(root, folder, overrides, read_world(os.environ), shapes)
        results = trials.run(job, start())
    return results, shown.getvalue()


def weights_of(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, optimizer included. Runs in a worker."""
    from megatron.core import dist_checkpointing

    from minitron_mcore.runtime.start import start

    start()
    state = dist_checkpointing.load_plain_tensors(f"{folder}/iter_{iteration:07d}")
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The training's lines of metrics.jsonl, without what a clock says."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("iteration", "lm loss", "logits distillation loss", "learning-rate", "grad-norm")
    return [{name: row[name] for name in names} for row in rows if row["kind"] == "train"]
