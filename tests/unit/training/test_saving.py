"""What is said beside the weights is said of what is there: the newest whole iteration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minitron_mcore.training import step
from minitron_mcore.training.config import TrainConfig
from minitron_mcore.training.job import Job


class OneRank:
    def on_main(self, work: Callable[[], Any]) -> Any:
        return work()


def test_a_save_that_fails_is_not_described(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done: list[str] = []
    newest: list[int] = []
    monkeypatch.setattr(step, "latest_iteration", lambda folder: newest[-1] if newest else None)

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


@pytest.mark.parametrize(
    ("iterations", "given", "interval"),
    [(8, None, 1), (500, None, 50), (501, None, 51), (100_000, None, 500), (100_000, 7, 7), (100_000, 0, 0)],
)
def test_a_run_saves_often_enough_by_default(iterations: int, given: int | None, interval: int) -> None:
    """Every tenth of it, but no more than 500 iterations apart; what is asked for holds."""
    run: Any = SimpleNamespace(ends_at=iterations, train=TrainConfig(save_interval=given))
    assert Job.save_interval.fget(run) == interval  # type: ignore[attr-defined]
