"""A disk that goes while a training runs: `on_save_error` decides, what was saved stays as it is, nothing is made anew
where another disk lies, and once it is back saves go on."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.checkpoint.folder import latest_iteration
from minitron_mcore.checkpoint.integrity import verify_checkpoint
from minitron_mcore.errors import StorageError
from tests.distributed.ranks import run_on_ranks
from tests.distributed.training import test_resume
from tests.distributed.training.test_resume import STEPS, fit_on_rank

GOES, COMES = 3, 5  # iterations before which the disk goes, and is back


def lost_on_rank(folder: str, way: str, keys: dict[str, Any], world_size: int) -> tuple[str, list[str]]:
    """`fit` whose disk goes in the given way, and comes back: (what it raised, the warnings)."""
    from minitron_mcore.runtime.start import Runtime

    said, batches, printing, my_batch = [], [], Runtime.print, test_resume.my_batch
    goes, comes = WAYS[way]

    def reading(batch: Any) -> Any:
        batches.append(1)
        if os.environ["RANK"] == "0":
            if len(batches) == GOES:
                goes(Path(folder))
            elif len(batches) == COMES:
                comes(Path(folder))
        return my_batch(batch)

    test_resume.my_batch = reading  # type: ignore[assignment]
    Runtime.print = lambda self, *words: said.append(" ".join(map(str, words)))  # type: ignore[method-assign]
    raised = ""
    try:
        fit_on_rank({}, world_size, folder, save_interval=1, **keys)
    except StorageError as error:
        raised = str(error)
    finally:
        test_resume.my_batch, Runtime.print = my_batch, printing  # type: ignore[method-assign]
    return raised, [line for line in said if line.startswith("WARNING")]


def away(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.away")


def move_away(folder: Path) -> None:
    folder.rename(away(folder))


def move_back(folder: Path) -> None:
    if folder.exists():
        folder.rmdir()  # nothing has been put there
    away(folder).rename(folder)


def uncover(folder: Path) -> None:
    move_away(folder)
    folder.mkdir()


def mount(*words: str) -> Callable[[Path], None]:
    return lambda folder: subprocess.run(
        [part.replace("@", str(folder.parent)) for part in words], check=True
    ).check_returncode()


def nothing(folder: Path) -> None:
    pass


WAYS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "gone": (move_away, move_back),
    "uncovered": (uncover, move_back),
    "unmounted": (mount("umount", "-l", "@"), nothing),
}


@pytest.mark.parametrize(
    ("way", "keys", "world_size"),
    [
        pytest.param("gone", {}, 2, marks=pytest.mark.slow),
        ("uncovered", {"async_save": True, "keep_last": 2}, 1),
    ],
)
def test_training_goes_on_without_its_disk(way: str, keys: dict[str, Any], world_size: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    keys = {**keys, "on_save_error": "continue"}
    raised, warnings = run_on_ranks(lost_on_rank, world_size, str(folder), way, keys, world_size)[0]
    assert raised == ""
    lost = [line for line in warnings if "and training goes on" in line]
    numbers = {int(line.partition("no checkpoint of iteration ")[2].partition(",")[0]) for line in lost}
    # That of the iteration before may not have been finished yet.
    assert {GOES, COMES - 1} <= numbers <= set(range(GOES - ("async_save" in keys), COMES))
    assert all(str(folder) in line for line in lost)
    assert latest_iteration(folder) == STEPS and verify_checkpoint(folder).faults == []
    rows = [json.loads(line)["iteration"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, STEPS + 1))
    kept = [5, 6] if "keep_last" in keys else [1, 2, 5, 6]
    assert sorted(path.name for path in folder.glob("*iter_*") if path.is_dir()) == [f"iter_{n:07d}" for n in kept]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["uncovered", "gone"])
def test_training_stops_without_its_disk(way: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    raised, _ = run_on_ranks(lost_on_rank, 1, str(folder), way, {}, 1)[0]
    words = {"gone": "cannot be written: [Errno 2]", "uncovered": "is another folder than when the training began"}
    assert raised.startswith(f"{folder} {words[way]}")
    assert not folder.exists() or not list(folder.iterdir()), "nothing is put where another disk lies"
    assert latest_iteration(away(folder)) == GOES - 1 and verify_checkpoint(away(folder)).faults == []


@pytest.mark.slow
@pytest.mark.parametrize("is_async", [False, True])
def test_a_real_mount(is_async: bool, tmp_path: Path) -> None:
    """Another copy of the mount shows what lies on the disk that was lost. (No system makes one read-only while a file
    of it is open to be written, as the run's lock is.)"""
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    copy.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("only root may mount")
    try:
        subprocess.run(["mount", "--bind", str(disk), str(copy)], check=True)
        keys = {"on_save_error": "continue", "async_save": is_async}
        raised, warnings = run_on_ranks(lost_on_rank, 1, str(disk / "run"), "unmounted", keys, 1)[0]
        assert any("no checkpoint of iteration 3" in line for line in warnings)
        assert raised.startswith(f"{disk / 'run'} "), raised  # the last one must be written
        # In the background, that of the iteration before may not have been finished yet.
        assert latest_iteration(copy / "run") in range(GOES - 1 - is_async, GOES) and not list(disk.iterdir())
    finally:
        for place in (copy, disk):
            subprocess.run(["umount", "-l", str(place)], capture_output=True)
