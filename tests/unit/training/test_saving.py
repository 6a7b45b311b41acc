"""What is said beside the weights is said of what is there: the newest whole iteration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minitron_mcore.checkpoint.store import SaveUnderWay
from minitron_mcore.errors import StorageError
from minitron_mcore.training import saving, step
from minitron_mcore.training.config import TrainConfig
from minitron_mcore.training.job import Job, Progress


class OneRank:
    def on_main(self, work: Callable[[], Any]) -> Any:
        return work()


def test_a_save_that_fails_is_not_described(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done: list[str] = []
    newest: list[int] = []
    monkeypatch.setattr(step, "resumed_iteration", lambda folder: newest[-1] if newest else None)

    def save(folder: Path, iteration: int, state: Any, runtime: Any, architecture: Any) -> None:
        if iteration == 3:
            raise OSError("no space is left")
        newest.append(iteration)
        done.append(f"saved {iteration}")

    monkeypatch.setattr(step, "save_state", save)
    monkeypatch.setattr(step, "training_state", lambda *arguments, is_loading: {})
    trained: Any = step.Trained([], None, None)  # type: ignore[arg-type]
    for iteration in (1, 2, 3):
        try:
            said = f"described {iteration}"
            trained.save(tmp_path, {"iteration": iteration}, OneRank(), None, lambda said=said: done.append(said))
        except OSError:
            done.append("failed")
    # The first one comes with its description: nobody could read it without.
    assert done == ["described 1", "saved 1", "saved 2", "described 2", "failed"]


class Written:
    """A save in the background, whose writers go on until they are stopped or told that they are done."""

    def __init__(self, name: str, iteration: int, done: list[str], fails: bool) -> None:
        self.name, self.iteration, self.done, self.fails = f"{name} {iteration}", iteration, done, fails
        self.state = SaveUnderWay.WRITING

    def finish(self) -> None:
        self.done.append(f"{'failed' if self.fails else 'finished'} {self.name}")
        if self.fails:
            raise StorageError("", "x", "cannot be written")

    def stop(self) -> None:
        self.done.append(f"stopped {self.name}")


def saver_of(done: list[str], fails: set[str], monkeypatch: pytest.MonkeyPatch, **keys: Any) -> saving.Saver:
    """Of a student and the teacher that is trained with it; `done` is told of everything in order."""

    def begin(name: str, iteration: int) -> Written:
        done.append(f"begun {name} {iteration}")
        return Written(name, iteration, done, f"{name} {iteration}" in fails)

    monkeypatch.setattr(
        saving, "drop_iteration", lambda folder, iteration: done.append(f"dropped {folder} {iteration}")
    )
    monkeypatch.setattr(saving, "save", lambda job, progress, *_: done.append(f"saved {progress.iteration}"))
    teaching = SimpleNamespace(folder="teacher", begin_save=lambda iteration, *_: begin("teacher", iteration))
    job: Any = SimpleNamespace(
        teaching=teaching,
        folder="student",
        architecture=None,
        train=TrainConfig(async_save=True, **keys),
        runtime=SimpleNamespace(
            print=done.append,
            warn=lambda words: done.extend([words] if words else []),
            is_main=True,
            on_main=lambda work: work(),
        ),
    )
    trained: Any = SimpleNamespace(begin_save=lambda folder, state, *_: begin("student", state["iteration"]))
    return saving.Saver(job, trained)


def test_saves_in_the_background_are_finished_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's first, since the student's is resumed with it; the one before goes when both are there."""
    done: list[str] = []
    saver = saver_of(done, set(), monkeypatch)
    assert saver.state == SaveUnderWay.DONE
    saver.save(Progress(iteration=2), at_once=False)
    assert saver.state == SaveUnderWay.WRITING
    saver.attend(SaveUnderWay.WRITING)  # of another rank
    assert done == ["begun teacher 2", "begun student 2"]
    saver.attend(SaveUnderWay.DONE)
    saver.save(Progress(iteration=4), at_once=False)
    saver.save(Progress(iteration=5), at_once=True)
    saver.close()
    both = [["begun teacher 2", "begun student 2"], ["begun teacher 4", "begun student 4"]]
    finished = [["finished teacher 2", "finished student 2"], ["finished teacher 4", "finished student 4"]]
    dropped = [["dropped student 2", "dropped teacher 2"], ["dropped student 4", "dropped teacher 4"]]
    waited = [line for line in done if line.startswith("waited ")]
    assert len(waited) == 1 and waited[0].endswith(
        " s for the checkpoint of iteration 4, which was still being written"
    )
    expected = [*both[0], *finished[0], *both[1], *finished[1], *dropped[0], *waited, "saved 5", *dropped[1]]
    assert sorted(done) == sorted(expected)
    kept = [line for line in done if not line.startswith("dropped")]  # by a thread of its own
    assert kept == [line for line in expected if not line.startswith("dropped")]


def test_a_teacher_in_training_keeps_what_its_student_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    saver = saver_of(done, set(), monkeypatch, keep_last=2, keep_every=10)
    asked: list[Any] = []

    def settle(folders: list[Any], kept: Any) -> list[tuple[Any, int]]:
        asked.append((folders, kept.last, kept.every))
        if len(asked) == 2:
            raise OSError("the disk is away")
        return [(folder, 2) for folder in folders]

    monkeypatch.setattr(saving, "settle", settle)
    for iteration in (4, 6):
        saver.save(Progress(iteration=iteration), at_once=False)
        saver.attend(SaveUnderWay.DONE)
        saver.close()
    assert asked == [(["student", "teacher"], 2, 10)] * 2
    assert [line for line in done if "dropped" in line] == ["dropped student 2", "dropped teacher 2"]
    assert "WARNING: older checkpoints than iteration 6 stay for now: the disk is away" in done


@pytest.mark.parametrize("fails", ["teacher 4", "student 4"])
def test_a_save_that_fails_leaves_the_one_before(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    saver = saver_of(done, {fails}, monkeypatch, on_save_error="continue")
    for iteration in (2, 4, 6):
        saver.save(Progress(iteration=iteration), at_once=False)
        saver.attend(SaveUnderWay.FAILED if fails.endswith(str(iteration)) else SaveUnderWay.DONE)
    saver.close()
    warning = "WARNING: no checkpoint of iteration 4, and training goes on: x cannot be written"
    assert warning in done and f"failed {fails}" in done and "finished student 4" not in done
    assert [line for line in done if "dropped" in line] == ["dropped student 2", "dropped teacher 2"]
    assert done.index(warning) < done.index("finished student 6")

    stopping = saver_of(done, {fails}, monkeypatch)
    stopping.save(Progress(iteration=4), at_once=False)
    with pytest.raises(StorageError, match="cannot be written"):
        stopping.attend(SaveUnderWay.FAILED)
    # The last one must not fail, whatever became of one before.
    last = saver_of(done, {fails}, monkeypatch, on_save_error="continue")
    last.save(Progress(iteration=4), at_once=False)
    last.save(Progress(iteration=5), at_once=True)
    assert done[-1] == "saved 5"

    def fail(*arguments: Any) -> None:
        raise StorageError("", "y", "cannot be written")

    monkeypatch.setattr(saving, "save", fail)
    with pytest.raises(StorageError, match="y cannot be written"):
        last.save(Progress(iteration=6), at_once=True)


@pytest.mark.parametrize(
    ("iterations", "given", "interval"),
    [(8, None, 1), (500, None, 50), (501, None, 51), (100_000, None, 500), (100_000, 7, 7), (100_000, 0, 0)],
)
def test_a_run_saves_often_enough_by_default(iterations: int, given: int | None, interval: int) -> None:
    """Every tenth of it, but no more than 500 iterations apart; what is asked for holds."""
    run: Any = SimpleNamespace(ends_at=iterations, train=TrainConfig(save_interval=given))
    assert Job.save_interval.fget(run) == interval  # type: ignore[attr-defined]
