"""A training keeps the checkpoints that it is told to, and calls one of them the best, also when it is resumed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.checkpoint.folder import latest_iteration, read_architecture
from minitron_mcore.checkpoint.integrity import verify_checkpoint
from tests.distributed.ranks import run_on_ranks
from tests.distributed.training.test_resume import STEPS, fit_on_rank

# By the iteration of the validation; iterations between are saved with that of the one before.
LOSSES = {2: 3.0, 4: 2.0, 6: 2.5}


def kept_on_rank(folder: str, keys: dict[str, Any], world_size: int) -> list[list[str]]:
    """`fit`: which iterations lie in the folder whenever one is about to be dropped, and at the end."""
    from minitron_mcore.training import loop, saving

    place, seen, drop, validate = Path(folder), [], saving.drop_iteration, loop.validate
    validations = iter(LOSSES.values())

    def seeing(target: Path, iteration: int) -> None:
        seen.append(sorted(path.name for path in place.glob("iter_*")))
        drop(target, iteration)

    saving.drop_iteration = seeing  # type: ignore[assignment]
    loop.validate = lambda chunks, job: {"lm loss validation": next(validations)}  # type: ignore[assignment]
    try:
        fit_on_rank({}, world_size, folder, validation=(), **keys)
    finally:
        saving.drop_iteration, loop.validate = drop, validate
    return [*seen, sorted(path.name for path in place.glob("*iter_*") if path.is_dir())]


def names(*iterations: int) -> list[str]:
    return [f"iter_{iteration:07d}" for iteration in iterations]


@pytest.mark.parametrize(
    ("keys", "world_size", "left", "best"),
    [
        pytest.param({"save_interval": 1, "keep_last": 2}, 2, names(5, 6), None, marks=pytest.mark.slow),
        ({"save_interval": 1, "keep_last": 1, "keep_best": 1, "async_save": True}, 1, names(4, 6), 4),
        ({"save_interval": 2, "keep_last": 1, "keep_every": 3, "keep_best": 2}, 1, names(3, 4, 6), 4),
        pytest.param({"save_interval": 0, "keep_every": 2}, 1, names(2, 4, 6), None, marks=pytest.mark.slow),
        pytest.param({"save_interval": None, "keep_every": 3}, 1, names(3, 6), None, marks=pytest.mark.slow),
    ],
)
def test_what_stays(keys: dict[str, Any], world_size: int, left: list[str], best: int | None, tmp_path: Path) -> None:
    keys = {"eval_interval": 2, **keys}
    *seen, found = run_on_ranks(kept_on_rank, world_size, str(tmp_path), keys, world_size)[0]
    assert found == left and latest_iteration(tmp_path) == STEPS
    # Whatever goes, one that is newer is there.
    assert all(len(lying) >= 2 for lying in seen)
    assert (tmp_path / "best").is_symlink() == (best is not None)
    if best is not None:
        assert os.readlink(tmp_path / "best") == names(best)[0]
        read_architecture(tmp_path / "best")
        assert verify_checkpoint(tmp_path / "best").faults == []
