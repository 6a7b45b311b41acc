"""`minitron run` with prune.steps: every step's folder, shape and scores, and going on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from minitron_mcore.architecture import load_architecture
from minitron_mcore.importance.scores import load_scores
from minitron_mcore.pruning.plan_file import load_plan
from tests.distributed.ranks import run_on_ranks
from tests.e2e.verbs import all_typed, run_well

COMMON = [
    "output=@/run",
    "teacher.checkpoint=@/teacher",
    "tokenizer.model=@/tokenizer.model",
    "data.train=@/json_text_document",
    "data.valid=@/json_text_document",
    "data.sequence_length=32",
    "data.num_workers=0",
    "importance.num_samples=6",
    "evaluate.samples=4",
    "distill.tokens=256",
    "distill.global_batch_size=4",
    "distill.micro_batch_size=2",
    "log.wandb=disabled",
    "log.tensorboard=false",
    "student.num_layers=2",
    "student.hidden_size=36",
    "student.ffn_hidden_size=64",
    "prune.steps=2",
    "prune.step_tokens=128",
    "prune.layers=contiguous",
    "prune.depth_metric=lm_loss",
    "importance.depth_metrics=[lm_loss]",
]
STEPS = ["prune-student-step-1", "train-student-step-1", "score-student-step-2", "prune-student"]
REFUSED: list[tuple[list[str], str]] = [
    (["prune.steps=0"], "prune.steps=0 must be at least 1"),
    (["prune.steps=1"], "prune.step_tokens=128 trains between steps, but prune.steps=1 has one"),
    (["prune.step_tokens=-1"], "prune.step_tokens=-1 must be at least 0"),
    (["prune.step_loss=guess"], "prune.step_loss=guess must be one of distillation, next_token"),
    (["student.layers=[0,1]"], "student.layers=[0, 1] names the teacher's layers, but prune.steps=2 chooses again"),
    (["distill.lr_warmup_iters=1"], "distill.lr_warmup_iters=1 must be less than the 1 iteration"),
    (["plan=@/plan.json"], "plan=@/plan.json is of one step, but prune.steps=2"),
]


def commanded(root: Path, verb: str, *overrides: str) -> list[str]:
    return [verb, *(text.replace("@", str(root)) for text in [*COMMON, *overrides])]


@pytest.fixture(scope="module")
def root(corpus_with_teacher: Callable[[str], Path]) -> Path:
    return corpus_with_teacher("iterate")


@pytest.fixture(scope="module")
def shown(root: Path) -> str:
    return run_well(*commanded(root, "run", "parallel.tensor=2"), world_size=2)


def test_every_step_has_its_shape_and_scores(root: Path, shown: str) -> None:
    """4 layers, hidden 48, ffn 96 to 2, 36, 64: half way is 3, 42, 80."""
    folder = root / "run" / "students" / "student"
    half, end = (
        load_architecture(folder / "step-1" / "pruned" / "architecture.yaml"),
        load_plan(folder / "pruned" / "plan.json"),
    )
    assert (half.num_layers, half.hidden_size, half.ffn_hidden_size) == (3, 42, 80)
    assert load_architecture(folder / "step-1" / "distilled" / "architecture.yaml") == half == end.teacher
    assert (end.student.num_layers, end.student.hidden_size, end.student.ffn_hidden_size) == (2, 36, 64)
    scores = load_scores(folder / "step-2" / "scores.safetensors")
    assert scores.architecture == half and list(scores.depth) == ["lm_loss@1"]
    assert scores.settings["teacher"]["checkpoint"] == str(folder / "step-1" / "distilled")
    lineage = yaml.safe_load((folder / "pruned" / "lineage.yaml").read_text())
    assert lineage["teacher"]["lineage"]["stage"] == "distill" and lineage["teacher"]["lineage"]["tokens"] == 128
    taught = yaml.safe_load((folder / "distilled" / "lineage.yaml").read_text())
    assert taught["teacher"]["checkpoint"] == str(root / "teacher"), "the whole teacher, not the half-way one"
    done = {path.stem for path in (root / "run" / "done").glob("*.json")}
    assert {*STEPS, "score", "distill-student", "export-student"} <= done
    assert set(json.loads((root / "run" / "results.json").read_text())) == {
        "teacher",
        "student pruned",
        "student distilled",
    }


def test_it_goes_on_where_it_was(root: Path, shown: str) -> None:
    folder, done = root / "run" / "students" / "student", root / "run" / "done"
    before = (folder / "pruned" / "plan.json").read_text()
    for name in STEPS[1:]:
        (done / f"{name}.json").unlink()
    shutil.rmtree(folder / "pruned")
    again = run_well(*commanded(root, "run", "parallel.tensor=2"), world_size=2)
    assert "prune student, step 1 of 2: done before" in again
    assert "score student, step 2 of 2: done before" not in again and "made in the same way" in again
    assert (folder / "pruned" / "plan.json").read_text() == before


def test_next_token_training_between(root: Path, tmp_path: Path) -> None:
    overrides = [f"output={tmp_path}/run", "prune.step_loss=next_token"]
    run_well(*commanded(root, "run", *overrides))
    lineage = yaml.safe_load((tmp_path / "run/students/student/step-1/distilled/lineage.yaml").read_text())
    assert lineage["stage"] == "train" and lineage["tokens"] == 128


def test_bad_input_is_named_and_nothing_is_written(root: Path, shown: str) -> None:
    commands = [commanded(root, "run", "output=@/new", *overrides) for overrides, _ in REFUSED]
    commands.append(commanded(root, "prune", "scores=@/run/scores.safetensors", "student.checkpoint=@/new"))
    words = [*(said for _, said in REFUSED), "prune.steps=2 scores between its steps, which only `run` does"]
    for said, command, (code, error, untouched) in zip(
        words, commands, run_on_ranks(all_typed, 1, commands, root)[0], strict=True
    ):
        assert code == 2 and error.count("\n") == 1, (command, error)
        assert said.replace("@", str(root)) in error, error
        assert untouched, command
