"""A checkpoint that is written while training goes on holds what one holds that training waited for, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_mcore.checkpoint.folder import latest_iteration, read_lineage
from minitron_mcore.checkpoint.store import SaveUnderWay
from minitron_mcore.errors import DivergedError, StorageError
from tests.distributed.models import LAYOUTS
from tests.distributed.ranks import run_on_ranks
from tests.distributed.training import test_resume
from tests.distributed.training.test_resume import STEPS, cut_off, fit_on_rank


def fit_with(parallel: dict[str, Any], world_size: int, folder: str, how: dict[str, Any], precision: str) -> list[str]:
    """`fit` with these keys beside; what the first rank printed."""
    from minitron_mcore.runtime.start import Runtime

    said: list[str] = []
    printing = Runtime.print

    def hear(self: Any, *words: object) -> None:
        said.append(" ".join(map(str, words)))

    Runtime.print = hear  # type: ignore[method-assign]
    try:
        fit_on_rank(parallel, world_size, folder, precision, how.pop("save_interval", 2), **how)
    finally:
        Runtime.print = printing  # type: ignore[method-assign]
    return said


def slow_writer(how_long: dict[int, float]) -> Any:
    """In place of Megatron's function that writes a file: it takes longer, by rank."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    original = FileSystemWriterAsync.write_preloaded_data

    def write(*arguments: Any, **named: Any) -> Any:
        time.sleep(how_long.get(int(os.environ["RANK"]), 0.0))
        return original(*arguments, **named)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(write)  # type: ignore[method-assign]
    return original


def both_on_rank(layout: str, folder: str, precision: str) -> dict[str, Any]:
    """A run that waits for its checkpoints and one that does not, under a writer as slow as a few steps."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    world_size, parallel = LAYOUTS[layout]
    said = {}
    original = slow_writer({0: 0.1})
    try:
        for name, is_async in (("waits", False), ("goes on", True)):
            target = str(Path(folder) / name)
            said[name] = fit_with(parallel, world_size, target, {"async_save": is_async}, precision)
    finally:
        FileSystemWriterAsync.write_preloaded_data = original  # type: ignore[method-assign]
    return said


@pytest.mark.parametrize(
    "layout", ["1 bf16", "DP2 bf16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("TP2", "PP2-VPP2"))]
)
def test_it_holds_what_a_save_holds_that_training_waits_for(layout: str, tmp_path: Path) -> None:
    name, _, precision = layout.partition(" ")
    run_on_ranks(both_on_rank, LAYOUTS[name][0], name, str(tmp_path), precision or "fp32")
    folders = [tmp_path / "waits", tmp_path / "goes on"]
    for iteration in range(2, STEPS + 1, 2):
        places = [folder / f"iter_{iteration:07d}" for folder in folders]
        manifests = [json.loads((place / "manifest.json").read_text()) for place in places]
        for manifest in manifests:
            del manifest["files"][".metadata"]  # it names the folder
        assert manifests[0] == manifests[1]
        assert len(manifests[0]["tensors"]) > 30
    assert [latest_iteration(folder) for folder in folders] == [STEPS, STEPS]
    assert read_lineage(folders[0]) == read_lineage(folders[1])
    assert not list(tmp_path.glob("*/.unfinished*"))
    if name != "1":
        return
    # And a run goes on from it as the one that was never cut off.
    history = [json.loads(line) for line in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    cut_off(folders[1], tmp_path / "cut", 2)
    resumed = run_on_ranks(fit_on_rank, 1, {}, 1, str(tmp_path / "cut"), precision, 2)[0]["history"]
    expected = {row["iteration"]: (row["lm loss"], row["grad-norm"]) for row in history if row["iteration"] > 2}
    assert resumed == expected and len(resumed) == STEPS - 2


def ended_on_rank(folder: str, how: str) -> tuple[str, list[str]]:
    """A training whose checkpoint of iteration 2 is still being written when it ends: how, and what it printed."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from minitron_mcore.runtime.start import Runtime

    original, said, printing, my_batch = slow_writer({0: 0.5}), [], Runtime.print, test_resume.my_batch
    batches: list[int] = []

    def interrupting(batch: Any) -> Any:
        batches.append(1)
        if len(batches) == 3:
            if how == "diverged":
                raise DivergedError("as a training does")
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGTERM)
        return my_batch(batch)

    test_resume.my_batch = interrupting  # type: ignore[assignment]
    Runtime.print = lambda self, *words: said.append(" ".join(map(str, words)))  # type: ignore[method-assign]
    left = "finished"
    try:
        fit_on_rank({}, 1, folder, save_interval=2, async_save=True)
    except (DivergedError, SystemExit) as error:
        left = type(error).__name__
    finally:
        FileSystemWriterAsync.write_preloaded_data = original  # type: ignore[method-assign]
        test_resume.my_batch, Runtime.print = my_batch, printing  # type: ignore[method-assign]
    return left, said


@pytest.mark.parametrize(("how", "newest"), [("diverged", 2), pytest.param("SIGTERM", 3, marks=pytest.mark.slow)])
def test_the_last_one_is_finished_whatever_ends_the_training(how: str, newest: int, tmp_path: Path) -> None:
    left, said = run_on_ranks(ended_on_rank, 1, str(tmp_path), how)[0]
    assert left == {"diverged": "DivergedError", "SIGTERM": "SystemExit"}[how]
    waited = [line for line in said if "for the checkpoint of iteration 2, which was still being written" in line]
    assert len(waited) == 1 and float(waited[0].split()[1]) > 0.2
    assert latest_iteration(tmp_path) == newest
    assert (tmp_path / "iter_0000002" / "manifest.json").is_file()
    assert not list(tmp_path.glob(".unfinished*"))


def failing_on_rank(folder: str, way: str, on_save_error: str) -> tuple[str, list[str], list[str], float]:
    """(what was raised, what was printed, what lies there, seconds) where rank 0 cannot write iteration 4."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from minitron_mcore.runtime.start import Runtime
    from minitron_mcore.training import step

    original, said, printing = FileSystemWriterAsync.write_preloaded_data, [], Runtime.print
    is_main, my_batch, saves, batches = os.environ["RANK"] == "0", test_resume.my_batch, [], []

    class Known(SaveUnderWay):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            saves.append(self)

    def reading(batch: Any) -> Any:
        batches.append(1)
        while len(batches) == 5 and is_main and saves[-1].state == SaveUnderWay.WRITING:
            time.sleep(0.01)
        return my_batch(batch)

    def write(*arguments: Any, **named: Any) -> Any:
        bucket = named["write_bucket"]
        if "iter_0000004" in str(bucket[0]):
            if not is_main:
                time.sleep(WRITES_LONG)
            if way == "died":
                os.kill(os.getpid(), signal.SIGKILL)
            named["write_bucket"] = ("/dev/full", *bucket[1:])
        return original(*arguments, **named)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(write)  # type: ignore[method-assign]
    Runtime.print = lambda self, *words: said.append(" ".join(map(str, words)))  # type: ignore[method-assign]
    step.SaveUnderWay, test_resume.my_batch = Known, reading  # type: ignore[misc,assignment]
    begun, raised = time.monotonic(), ""
    try:
        fit_on_rank({}, 2, folder, save_interval=2, async_save=True, on_save_error=on_save_error)
    except StorageError as error:
        raised = str(error)
    finally:
        FileSystemWriterAsync.write_preloaded_data = original  # type: ignore[method-assign]
        Runtime.print = printing  # type: ignore[method-assign]
        step.SaveUnderWay, test_resume.my_batch = SaveUnderWay, my_batch  # type: ignore[misc]
    lasted = time.monotonic() - begun
    torch.distributed.barrier()
    return raised, said, sorted(path.name for path in Path(folder).iterdir() if "iter" in path.name), lasted


TRACKER = "latest_checkpointed_iteration.txt"
WRITES_LONG = 90.0  # seconds of another rank, which are not waited for


@pytest.mark.parametrize("way", ["full", pytest.param("died", marks=pytest.mark.slow)])
def test_one_that_fails_is_told_on_every_rank(way: str, tmp_path: Path) -> None:
    words = {
        "full": "No space left on device",
        "died": "of the process that wrote rank 0's part, it was ended by SIGKILL",
    }
    for raised, _, left, lasted in run_on_ranks(failing_on_rank, 2, str(tmp_path / "stop"), way, "stop"):
        assert raised.startswith(f"{tmp_path / 'stop'} cannot be written: ") and words[way] in raised
        assert left == ["iter_0000002", TRACKER] and lasted < WRITES_LONG
    for raised, said, left, lasted in run_on_ranks(failing_on_rank, 2, str(tmp_path / "continue"), way, "continue"):
        assert raised == "" and left == ["iter_0000002", "iter_0000006", TRACKER] and lasted < WRITES_LONG
        assert [line for line in said if line.startswith("WARNING: no checkpoint of iteration 4, and training goes on")]


@pytest.mark.slow
def test_after_a_kill_the_one_before_is_whole_and_nobody_writes_on(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="exit code"):
        run_on_ranks(ended_on_rank, 1, str(tmp_path), "killed")
    time.sleep(1.0)
    assert not list(tmp_path.glob(".unfinished*/*.distcp")), "the writer outlived its rank"
    assert latest_iteration(tmp_path) is None
    assert run_on_ranks(ended_on_rank, 1, str(tmp_path), "finishes")[0][0] == "SystemExit"
