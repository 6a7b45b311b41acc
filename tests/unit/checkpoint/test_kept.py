"""Which checkpoints stay, and which one is called the best."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.checkpoint.folder import TRACKER, drop_iteration, find_checkpoint, is_iteration
from minitron_mcore.checkpoint.kept import (
    Kept,
    best_first,
    best_iteration,
    settle,
    validation_losses,
    write_validation,
)
from minitron_mcore.errors import InputError
from minitron_mcore.training.config import TrainConfig
from minitron_mcore.training.saving import kept_by

LOSSES = {100: 3.0, 200: 2.0, 300: 2.5, 400: 2.0, 500: 2.7}


@pytest.mark.parametrize(
    ("kept", "stay"),
    [
        (Kept(), [100, 200, 300, 400, 500]),
        (Kept(last=1), [500]),
        (Kept(last=2), [400, 500]),
        (Kept(last=9), [100, 200, 300, 400, 500]),
        (Kept(last=1, every=200), [200, 400, 500]),
        (Kept(last=1, best=1), [200, 500]),
        (Kept(last=1, best=2), [200, 400, 500]),
        (Kept(last=1, best=9), [100, 200, 300, 400, 500]),
        (Kept(last=1, every=300, best=1), [200, 300, 500]),
        (Kept(best=1), [100, 200, 300, 400, 500]),
    ],
)
def test_what_stays(kept: Kept, stay: list[int]) -> None:
    assert kept.dropped(list(LOSSES), LOSSES) == sorted(LOSSES.keys() - set(stay))


def test_the_best_comes_first() -> None:
    """The earlier of two that are equal; one without a loss is compared with none."""
    assert best_first([100, 200, 300, 400, 500], LOSSES) == [200, 400, 300, 500, 100]
    assert best_first([100, 600], {600: 1.0, 700: 0.5}) == [600]
    assert Kept(last=1, best=1).dropped([100, 200, 300], {}) == [100, 200]


def finished(folder: Path, iteration: int, loss: float | None, name: str = "lm loss validation") -> None:
    place = folder / f"iter_{iteration:07d}"
    place.mkdir(parents=True)
    for part in ("metadata.json", ".metadata", "common.pt"):
        (place / part).write_text("{}")
    if loss is not None:
        write_validation(place, {name: loss, "ppl validation": 9.0})
    (folder / TRACKER).write_text(str(iteration))


def test_settling_a_student_and_its_teacher(tmp_path: Path) -> None:
    """Both keep what the student's losses say; what nobody finished, or comes after the newest, is left alone."""
    student, teacher = tmp_path / "student", tmp_path / "teacher"
    for iteration, loss in LOSSES.items():
        finished(student, iteration, loss)
        finished(teacher, iteration, None)
    finished(teacher, 450, None)  # the student's could not be written then
    finished(student, 900, 0.1)
    for folder in (student, teacher):
        (folder / TRACKER).write_text("500")
        (folder / ".unfinished_iter_0000600").mkdir()
        (folder / ".unfinished_iter_0000050").mkdir()  # of a save that was cut off
        (folder / "best").symlink_to("iter_0000100")
    going = settle([student, teacher], Kept(last=1, best=1))
    expected = [(folder, iteration) for folder in (student, teacher) for iteration in (50, 100, 300, 400, 450)]
    assert sorted(going) == sorted(set(expected) - {(student, 450)})
    for folder, iteration in going:
        drop_iteration(folder, iteration)
    for folder in (student, teacher):
        assert os.readlink(folder / "best") == "iter_0000200" and best_iteration(folder) == 200
        left = {path.name for path in folder.iterdir()} - {"iter_0000900"}
        assert left == {"best", TRACKER, "iter_0000200", "iter_0000500", ".unfinished_iter_0000600"}


def test_the_best_is_named_as_any_iteration_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path, 100, 3.0)
    finished(tmp_path, 200, 4.0)
    assert settle([tmp_path], Kept(best=1)) == []
    assert is_iteration(tmp_path / "best")
    assert find_checkpoint(tmp_path / "best", "checkpoint") == (tmp_path / "best", 100)
    assert find_checkpoint(tmp_path, "checkpoint") == (tmp_path, 200)
    drop_iteration(tmp_path, 100)
    assert not (tmp_path / "best").is_symlink(), "a link that leads nowhere"
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "mine").touch()
    assert settle([tmp_path], Kept(last=1, best=1)) == []
    assert f"WARNING: {tmp_path / 'best'} cannot lead to iteration 200, the best one: " in capsys.readouterr().err
    assert (tmp_path / "best" / "mine").is_file()


def test_which_loss_counts(tmp_path: Path) -> None:
    """That which is trained, where it has a name of its own; one that is none, or that cannot be read, does not."""
    finished(tmp_path, 1, 3.0)
    finished(tmp_path, 2, 0.7, "loss validation")
    finished(tmp_path, 3, float("nan"))
    finished(tmp_path, 4, None)
    finished(tmp_path, 5, 2.0, "lm loss validation books")
    (tmp_path / "iter_0000006").mkdir()
    (tmp_path / "iter_0000006" / "validation.json").write_text("[")
    both = tmp_path / "iter_0000002" / "validation.json"
    both.write_text(json.dumps({"lm loss validation": 5.0, "loss validation": 0.7}))
    assert validation_losses(tmp_path, [1, 2, 3, 4, 5, 6]) == {1: 3.0, 2: 0.7}


def test_what_the_keys_say() -> None:
    assert kept_by(TrainConfig()) is None and kept_by(TrainConfig(save_interval=5)) is None
    assert kept_by(TrainConfig(keep_every=7)) == Kept(1, 7, None)
    assert kept_by(TrainConfig(save_interval=5, keep_last=2, keep_every=7)) == Kept(2, 7, None)
    assert kept_by(TrainConfig(save_interval=5, keep_best=2, eval_interval=5)) == Kept(None, None, 2)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"keep_last": 0}, "keep_last=0 must be at least 1"),
        ({"keep_best": 0}, "keep_best=0 must be at least 1"),
        (
            {"keep_every": 4, "save_interval": 2},
            "keep_every=4 has no effect with save_interval=2 and keep_last=null, where all stay: give keep_last too, "
            "or leave it out",
        ),
        (
            {"keep_best": 1},
            "keep_best=1 compares validation losses, but with eval_interval=0 there are none on the way: set "
            "eval_interval, or leave keep_best out",
        ),
        ({"keep_best": 1, "eval_interval": 5, "eval_iters": 0}, "but with eval_iters=0 there are none on the way"),
    ],
)
def test_keys_that_cannot_be(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        TrainConfig(**keys)
    assert words in str(caught.value)
