"""Teacher correction as typed, before and while the student is distilled; and the teacher of a run that goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron_mcore.errors import InputError
from minitron_mcore.runtime.folder_lock import TRAINING_LOCK, FolderLock
from tests.e2e.test_bad_input import RECIPE
from tests.e2e.verbs import all_run_well, minitron, run_well


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """(folder, arguments) of a teacher and its pruned student."""
    folder = tmp_path_factory.mktemp("correct")
    lines = [" ".join(f"{word}{number % 7}" for word in ("prune", "distil", "score") * 20) for number in range(40)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE).replace("@", str(folder)))
    config = ["--config", str(recipe)]
    teacher, student = f"teacher.checkpoint={folder / 'teacher'}", f"student.checkpoint={folder / 'student'}"
    scores = f"scores={folder / 'scores.safetensors'}"
    all_run_well(
        [
            ["tokenizer", *config, f"tokenizer.model={folder / 'tokenizer.model'}"],
            ["preprocess", *config, f"input={folder / 'text.jsonl'}", f"output_prefix={folder / 'data' / 'tokens'}"],
            ["train", *config, f"train.checkpoint={folder / 'teacher'}"],
            ["score", *config, teacher, scores],
            ["prune", *config, teacher, scores, student, "student.hidden_size=24"],
        ]
    )
    return folder, [*config, teacher, student, "log.interval=1"]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == "train"]


SHAPE = ["global_batch_size=4", "micro_batch_size=2", "lr=1e-2", "min_lr=1e-3", "save_interval=2"]


def test_corrected_before_and_while_it_teaches(road: tuple[Path, list[str]]) -> None:
    """The teacher learns the same in both, from the same batches; and so does a run that was cut off."""
    folder, shared = road
    correct = [f"correct.{key}" for key in SHAPE]
    distill = [f"distill.{key}" for key in SHAPE] + ["distill.tokens=256"]
    before = ["correct", *shared, *correct, "correct.tokens=256", f"correct.checkpoint={folder / 'before'}"]
    beside = [
        "distill",
        *shared,
        *correct,
        *distill,
        "distill.correct_teacher=true",
        f"correct.checkpoint={folder / 'beside'}",
        f"distill.checkpoint={folder / 'distilled'}",
    ]
    all_run_well([before, beside])
    alone, together = steps_of(folder / "before"), steps_of(folder / "distilled")
    assert len(together) == len(alone) > 3
    for row, expected in zip(together, alone, strict=True):
        assert row["teacher lm loss"] == expected["lm loss"]
        assert row["teacher grad-norm"] == expected["grad-norm"]
        assert row["teacher learning-rate"] == expected["learning-rate"]
        assert row["logits distillation loss"] > 0
    assert together[-1]["teacher lm loss"] < together[0]["teacher lm loss"]

    # Its learning rate follows the budget, which therefore stays.
    code, shown = minitron(*beside, "distill.tokens=512")
    assert code == 2 and "correct.checkpoint=" in shown and "distill.tokens is 256 there and 512 here" in shown

    # Both corrected teachers are checkpoints like any other, and the same one.
    losses = []
    for name in ("before", "beside"):
        run_well("evaluate", *shared, f"checkpoint={folder / name}", f"results={folder / name}.json")
        losses.append(json.loads((folder / f"{name}.json").read_text())["lm loss"])
        assert "correct" in run_well("inspect", str(folder / name))
    assert losses[0] == losses[1]

    # Killed between the teacher's last checkpoint and the student's: both go on from the iteration that both have.
    for name in ("distilled", "beside"):
        shutil.copytree(folder / name, folder / f"{name}-cut")
    cut = folder / "distilled-cut"
    shutil.rmtree(max(cut.glob("iter_*")))
    (cut / "latest_checkpointed_iteration.txt").write_text("2")
    (cut / "metrics.jsonl").unlink()
    for name in ("distilled", "beside"):
        stored = folder / f"{name}-cut" / "recipe.yaml"
        text = stored.read_text()
        for other in ("distilled", "beside"):
            text = text.replace(str(folder / other) + "\n", str(folder / f"{other}-cut") + "\n")
        stored.write_text(text)
    run_well(*beside, f"correct.checkpoint={folder / 'beside-cut'}", f"distill.checkpoint={cut}")
    resumed = steps_of(cut)
    assert [row["iteration"] for row in resumed] == [row["iteration"] for row in together[2:]]
    for row, expected in zip(resumed, together[2:], strict=True):
        for name in ("teacher lm loss", "teacher grad-norm", "lm loss", "logits distillation loss", "grad-norm"):
            assert row[name] == expected[name], name


REFUSED = [
    (["teacher.placement=offloaded"], "teacher.placement=offloaded does not go with distill.correct_teacher=true"),
    (["distill.teacher_window=1"], "distill.teacher_window=1 does not go with distill.correct_teacher=true"),
    (["correct.tokens=64"], "correct.tokens=64 does not go with distill.correct_teacher=true"),
    (["correct.checkpoint=null"], "correct.checkpoint is not given"),
    (["correct.checkpoint=@/teacher"], "is teacher.checkpoint's own folder"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_what_correction_does_not_go_with(road: tuple[Path, list[str]], changes: list[str], words: str) -> None:
    folder, shared = road
    arguments = [*shared, "distill.correct_teacher=true", "distill.tokens=64"]
    arguments += [f"distill.checkpoint={folder / 'never'}", f"correct.checkpoint={folder / 'never-teacher'}"]
    code, shown = minitron("distill", *arguments, *(change.replace("@", str(folder)) for change in changes))
    assert code == 2 and words in shown, shown
    assert not (folder / "never").exists() and not (folder / "never-teacher").exists()


def test_correct_takes_the_teacher(road: tuple[Path, list[str]]) -> None:
    folder, shared = road
    code, shown = minitron("correct", *shared, f"correct.load={folder}", "correct.checkpoint=x", "correct.tokens=64")
    assert code == 2 and "what is corrected is teacher.checkpoint" in shown


def test_a_run_goes_on_with_the_teacher_that_it_began_with(road: tuple[Path, list[str]]) -> None:
    """Though its folder has a newer iteration by now; not where that teacher is gone, or another is in its place."""
    folder, shared = road
    teacher, student = folder / "living-teacher", folder / "taught"
    shutil.copytree(folder / "teacher", teacher)
    command = ["distill", *shared, *(f"distill.{key}" for key in SHAPE), "distill.lr_decay_style=constant"]
    command += [f"teacher.checkpoint={teacher}", f"distill.checkpoint={student}"]
    run_well(*command, "distill.tokens=128")
    began = max(teacher.glob("iter_*"))
    began_at = int(began.name.removeprefix("iter_"))
    newer = teacher / f"iter_{began_at + 5:07d}"
    shutil.copytree(began, newer)
    tracker = teacher / "latest_checkpointed_iteration.txt"
    tracker.write_text(tracker.read_text().replace(str(began_at), str(began_at + 5)))
    shown = run_well(*command, "distill.tokens=256")
    assert f"goes on with iteration {began_at} of teacher.checkpoint={teacher}, with which it began" in shown
    taught_by = yaml.safe_load((student / "lineage.yaml").read_text())["teacher"]
    assert taught_by["iteration"] == began_at and len(taught_by["weights"]) > 16

    before = {path: path.stat().st_mtime_ns for path in student.rglob("*")}
    manifest = began / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    code, shown = minitron(*command, "distill.tokens=512")
    assert code == 2 and f"from iteration {began_at} of its teacher, which has other weights in" in shown
    shutil.rmtree(began)
    code, shown = minitron(*command, "distill.tokens=512")
    assert code == 2 and f"where the newest is {began_at + 5}: name or restore that teacher, or name" in shown
    assert before == {path: path.stat().st_mtime_ns for path in student.rglob("*")}


def test_one_run_writes_into_a_folder_at_a_time(road: tuple[Path, list[str]]) -> None:
    folder, shared = road
    target = folder / "contested"
    command = ["distill", *shared, *(f"distill.{key}" for key in SHAPE), "distill.tokens=64"]
    command.append(f"distill.checkpoint={target}")
    lock = FolderLock(target / TRAINING_LOCK, InputError("", "the folder", "is taken"))
    lock.take()
    code, shown = minitron(*command)
    assert code == 2 and f"distill.checkpoint={target} is being written by another run" in shown
    assert [path.name for path in target.iterdir()] == [TRAINING_LOCK]
    lock.release()
    assert not target.exists(), "it was made for the lock"
    run_well(*command)
    assert not (target / TRAINING_LOCK).exists() and list(target.glob("iter_*"))
