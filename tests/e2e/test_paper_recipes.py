"""The papers' compressions in configs/: `run --dry-run` of each passes, and makes the released models' shapes.

Weights are not needed: a teacher is its architecture.yaml and the mark of a checkpoint, text is a few words.
"""

from __future__ import annotations

import re
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from minitron_mcore import cli
from minitron_mcore.recipe import load_recipe
from tests.e2e.test_config_heads import told

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Paper:
    """A recipe as it is planned for, and what the paper has of it, typed from there (arXiv 2407.14679, 2408.11796).

    students: parameters in billions of the released models, worked out from their config.json. tokens: of each
    distillation. rates: peak and last. warmup: None where the paper has none.
    """

    teacher: str
    gpus: int
    steps: int
    students: dict[str, float]
    tokens: float
    batch: int
    length: int
    rates: tuple[float, float]
    warmup: int | None
    corrected: bool = True


RECIPES = {
    "llama-3.1-8b-to-4b-width": Paper("llama-3.1-8b", 256, 9, {"student": 4.51}, 94e9, 1152, 8192, (1e-4, 1e-5), 40),
    "llama-3.1-8b-to-4b-depth": Paper("llama-3.1-8b", 256, 9, {"student": 4.54}, 94e9, 1152, 8192, (1e-4, 1e-5), 40),
    "mistral-nemo-12b-to-8b": Paper(
        "mistral-nemo-12b", 256, 9, {"student": 8.41}, 380e9, 768, 8192, (1e-4, 4.5e-7), 60
    ),
    "nemotron-4-15b-to-8b-to-4b": Paper(
        "nemotron-4-15b", 128, 13, {"8b": 8.27, "4b": 4.19}, 94e9, 1152, 4096, (2e-4, 4.5e-7), None, False
    ),
}


def stand_in(shape: str, folder: Path) -> Path:
    """A checkpoint folder of that shape, for what reads no weights."""
    (folder / "iter_0000001").mkdir(parents=True)
    (folder / "iter_0000001" / "metadata.json").write_text("{}")
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
    shutil.copy(ROOT / "configs" / "models" / shape / "architecture.yaml", folder)
    return folder


def much_text(prefix: Path, documents: int = 2048, tokens: int = 8193) -> Path:
    """Token files of Megatron's form with enough for 1024 samples; the tokens are a hole in a file."""
    lengths = np.full(documents, tokens, np.int32)
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, documents, documents + 1)  # 8: uint16
    pointers = np.arange(documents, dtype=np.int64) * tokens * 2
    parts = lengths.tobytes(), pointers.tobytes(), np.arange(documents + 1, dtype=np.int64).tobytes()
    prefix.with_suffix(".idx").write_bytes(header + b"".join(parts))
    with prefix.with_suffix(".bin").open("wb") as stream:
        stream.truncate(documents * tokens * 2)
    return prefix


@pytest.mark.parametrize("name", RECIPES)
def test_a_dry_run_passes(name: str, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the layout of the recipe on the GPUs of its head; every step is resolved, none is refused."""
    paper = RECIPES[name]
    there = [
        f"teacher.checkpoint={stand_in(paper.teacher, tmp_path / 'teacher')}",
        f"tokenizer.model={words}/tokenizer.model",
        *(f"data.{part}={much_text(tmp_path / 'tokens')}" for part in ("train", "valid")),
        *(f"output={tmp_path}/run", f"cluster.gpus={paper.gpus}", "cluster.gpu_memory=80Gi"),
    ]
    recipe = ["run", "--config", str(ROOT / "configs" / f"{name}.yaml"), *there]
    assert cli.main([*recipe, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"[{paper.steps}/{paper.steps}] export " in shown and shown.endswith("dry run: nothing was written\n")
    assert not (tmp_path / "run").exists()
    for student, billions in paper.students.items():
        made = re.findall(rf"makes  student.checkpoint=\S*/{student}/pruned: checkpoint, ([\d,]+) parameters", shown)
        assert [int(count.replace(",", "")) / 1e9 for count in made] == [pytest.approx(billions, abs=0.005)]
    # The head has the same of a shape alone.
    (together,) = (line for line in told(ROOT / "configs" / f"{name}.yaml")[1] if line.startswith("together"))
    assert re.findall(r"forecast ([\d.]+ GiB) on a GPU", shown) == re.findall(r"[\d.]+ GiB", together)
    # Each link of a chain is cut from, and taught by, the one before it.
    taught = re.findall(r"reads  student\.checkpoint=.*\n  reads  teacher\.checkpoint=(\S*):", shown)
    first = tmp_path / ("run/corrected" if paper.corrected else "teacher")
    expected = [str(first), *(f"{tmp_path}/run/students/{each}/distilled" for each in paper.students)][:-1]
    assert taught == expected
    assert re.findall(r"reads  teacher\.checkpoint=(\S*):.*\n  reads  scores", shown) == expected


@pytest.mark.parametrize("name", RECIPES)
def test_the_hyperparameters_are_the_papers(name: str) -> None:
    paper, recipe = RECIPES[name], load_recipe(str(ROOT / "configs" / f"{name}.yaml"), [])
    distill, importance = recipe.distill, recipe.importance
    assert (distill.tokens, distill.global_batch_size, recipe.data.sequence_length) == (
        *(paper.tokens, paper.batch, paper.length),
    )
    assert (distill.lr, distill.min_lr, distill.lr_decay_style) == (*paper.rates, "cosine")
    assert paper.warmup in (None, distill.lr_warmup_iters)
    assert (distill.logit_loss, distill.temperature, distill.lm_weight) == ("forward_kl", 1.0, 0.0)
    assert not distill.hidden_states.sites and not distill.top_k
    assert (importance.num_samples, importance.batch_aggregation, importance.sequence_aggregation) == (
        *(1024, "l2", "mean"),
    )
    assert bool(recipe.correct.tokens) == paper.corrected
    if paper.corrected:
        assert (recipe.correct.tokens, recipe.correct.lr_warmup_iters) == (100e9, 120)


def test_the_depth_recipe_leaves_out_layers_16_to_31() -> None:
    """Counted from 1, as the paper does."""
    recipe = load_recipe(str(ROOT / "configs" / "llama-3.1-8b-to-4b-depth.yaml"), [])
    assert recipe.student.layers is not None
    assert {*range(1, 33)} - {layer + 1 for layer in recipe.student.layers} == {*range(16, 32)}
