"""Runs that are stopped: Ctrl-C and SIGTERM save first; a crash at any moment of a save costs no more than that save.

What goes on afterwards is the uninterrupted run, bit for bit (the same layout).
"""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_mcore.checkpoint import folder as checkpoint_folder
from minitron_mcore.checkpoint import iteration, store
from minitron_mcore.checkpoint.folder import TRACKER, latest_iteration
from minitron_mcore.runtime.interrupt import EXIT_DURATION, SIGNALS
from minitron_mcore.training import saving as saving_module
from tests.distributed.models import LAYOUTS
from tests.distributed.ranks import run_on_ranks
from tests.distributed.training import test_resume
from tests.distributed.training.test_resume import CUT, STEPS, fit_on_rank, run

TERMINATED = 5  # no multiple of the interval between checkpoints, and not the last iteration


def terminated_on_rank(
    parallel: dict[str, Any], world_size: int, folder: str, iteration: int, number: int = signal.SIGTERM
) -> tuple[Any, bool]:
    """`fit` until the last rank gets a signal: how this rank left, and whether it has its old handlers back."""
    calls, my_batch = itertools.count(1), test_resume.my_batch

    def interrupting(batch: Any) -> Any:
        if next(calls) == iteration and torch.distributed.get_rank() == world_size - 1:
            os.kill(os.getpid(), number)
        return my_batch(batch)

    handlers = [signal.getsignal(each) for each in SIGNALS]
    test_resume.my_batch = interrupting  # type: ignore[assignment]
    code: Any = "finished"
    try:
        fit_on_rank(parallel, world_size, folder)
    except SystemExit as leaving:
        code = leaving.code
    finally:
        test_resume.my_batch = my_batch  # type: ignore[assignment]
    return code, [signal.getsignal(each) for each in SIGNALS] == handlers


def terminated_after_the_last_save(parallel: dict[str, Any], world_size: int, folder: str) -> int:
    """`fit` whose last rank gets SIGTERM just before it returns: what its caller is told."""
    told: list[Any] = []

    def saving(job: Any, progress: Any, trained: Any, describe: Any) -> None:
        save(job, progress, trained, describe)
        told.append(job.runtime)
        if progress.iteration == STEPS and torch.distributed.get_rank() == world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    save, saving_module.save = saving_module.save, saving
    try:
        fit_on_rank(parallel, world_size, folder)
    finally:
        saving_module.save = save
    return told[-1].stop_signal


def limited_on_rank(
    parallel: dict[str, Any], world_size: int, folder: str
) -> dict[str, tuple[list[int], list[Any], list[int], dict[int, Any]]]:
    """`fit` again and again until it ends, under each limit: the iterations at which it stopped, how each start ended,
    what the caller was told, and all losses."""
    found, save, told = {}, saving_module.save, list[Any]()

    def saving(job: Any, progress: Any, trained: Any, describe: Any) -> None:
        save(job, progress, trained, describe)
        told.append(job.runtime)

    hurried = torch.distributed.get_rank() == world_size - 1 if world_size > 1 else True
    # A duration that is up at once, on the last rank alone; an interval that the end is a multiple of.
    limits: dict[str, dict[str, Any]] = {
        "none": {},
        "interval": {"exit_interval": 3},
        "duration": {"exit_duration_in_mins": 1e-9 if hurried else 1e9},
    }
    saving_module.save = saving
    try:
        for name, keys in limits.items():
            place, stops, endings, history = Path(folder, name), list[int](), list[Any](), {}
            told.clear()
            while not endings or endings[-1] != "finished":
                try:
                    history = fit_on_rank(parallel, world_size, str(place), save_interval=STEPS, **keys)["history"]
                    endings.append("finished")
                except SystemExit as leaving:
                    endings.append(leaving.code)
                stops.append(latest_iteration(place) or 0)
            found[name] = (stops, endings, [runtime.stop_signal for runtime in told], history)
    finally:
        saving_module.save = save
    return found


class Crash(BaseException):
    """The process is gone: nothing catches it."""


def crashed_on_rank(folder: str, moment: str) -> str:
    """`fit` until the process dies while it saves the last iteration."""

    def die(*arguments: Any, **keywords: Any) -> None:
        if latest_iteration(Path(folder)) == stands_at and (file is None or arguments[0].name == file):
            raise Crash(moment)
        original(*arguments, **keywords)

    module, name, file, stands_at = MOMENTS[moment]
    original = getattr(module, name)
    setattr(module, name, die)
    try:
        fit_on_rank({}, 1, folder)
    except Crash as crash:
        return str(crash)
    finally:
        setattr(module, name, original)
    return "finished"


# In the order of a save: (module, function that is not reached, for this file alone, the newest iteration then).
MOMENTS: dict[str, tuple[Any, str, str | None, int]] = {
    "before the weights are whole": (store._SaveOrTell, "save", None, CUT),
    "before the folder has its name": (iteration, "finish_iteration", None, CUT),
    "before the tracker moves": (checkpoint_folder, "write_whole", TRACKER, CUT),
    "before it is described": (checkpoint_folder, "write_whole", "lineage.yaml", STEPS),
}
LEFT = [[f".unfinished_iter_{STEPS:07d}"], [f".unfinished_iter_{STEPS:07d}"], [f"iter_{STEPS:07d}"]]


# How signals differ is in tests/unit/runtime/test_interrupt.py.
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGUSR1, 200), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_to_one_rank_saves_and_stops_all(number: int, code: int, tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS["TP2"]
    history, weights = run("TP2", tmp_path / "whole")
    folder = tmp_path / "stopped"
    ranks = run_on_ranks(terminated_on_rank, world_size, parallel, world_size, str(folder), TERMINATED, number)
    assert ranks == [(code, True)] * world_size
    assert latest_iteration(folder) == TERMINATED
    resumed_history, resumed_weights = run("TP2", folder)
    assert sorted(history) == list(range(1, STEPS + 1)) and resumed_history == history
    for name, value in weights.items():
        torch.testing.assert_close(resumed_weights[name], value, rtol=0, atol=0, msg=str(name))


def test_limits_stop_all_ranks_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """Each start does an iteration at least, so that the work comes to its end. At the end a time that is up is told to
    the caller, as `run` has further steps, and an interval is not."""
    world_size, parallel = LAYOUTS["DP2"]
    ranks = run_on_ranks(limited_on_rank, world_size, parallel, world_size, str(tmp_path))
    for found in ranks:
        none, interval, duration = (found[name][:3] for name in ("none", "interval", "duration"))
        assert none == ([STEPS], ["finished"], [0])
        assert interval[:2] == ([3, STEPS], [200, "finished"]) and interval[2][-1] == 0
        assert duration[:2] == (list(range(1, STEPS + 1)), [200] * (STEPS - 1) + ["finished"])
        assert duration[2] == [EXIT_DURATION] * STEPS
    whole, *others = (ranks[0][name][3] for name in ("none", "interval", "duration"))
    assert sorted(whole) == list(range(1, STEPS + 1)) and others == [whole, whole]


def test_sigterm_in_the_last_iteration_comes_too_late(tmp_path: Path) -> None:
    assert run_on_ranks(terminated_on_rank, 1, {}, 1, str(tmp_path), STEPS) == [("finished", True)]
    assert latest_iteration(tmp_path) == STEPS


def test_sigterm_during_the_last_save_is_told_to_the_caller(tmp_path: Path) -> None:
    """Which has further steps, as `run` has, that must not begin."""
    world_size, parallel = LAYOUTS["TP2"]
    ranks = run_on_ranks(terminated_after_the_last_save, world_size, parallel, world_size, str(tmp_path))
    assert ranks == [signal.SIGTERM] * world_size
    assert latest_iteration(tmp_path) == STEPS


@pytest.mark.parametrize(("moment", "left"), list(zip(MOMENTS, LEFT, strict=False)))
def test_a_crash_while_saving_leaves_the_last_checkpoint(moment: str, left: list[str], tmp_path: Path) -> None:
    assert run_on_ranks(crashed_on_rank, 1, str(tmp_path), moment) == [moment]
    folders = {path.name for path in tmp_path.iterdir() if "iter_" in path.name}
    assert folders == {f"iter_{CUT:07d}", *left}
    assert latest_iteration(tmp_path) == CUT, "an unfinished checkpoint is none"
    # The crash came after the last step, so the losses of the whole run are there already.
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    before = {line["iteration"]: (line["lm loss"], line["grad-norm"]) for line in lines}
    (tmp_path / "metrics.jsonl").unlink()
    after, _ = run("1", tmp_path)
    assert after == {step: before[step] for step in range(CUT + 1, STEPS + 1)}
    assert latest_iteration(tmp_path) == STEPS and not list(tmp_path.glob(".unfinished*"))


def test_a_crash_before_it_is_described_is_made_good(tmp_path: Path) -> None:
    """What is said beside the weights is of the iteration before, until the same command comes again."""
    moment = "before it is described"
    assert run_on_ranks(crashed_on_rank, 1, str(tmp_path), moment) == [moment]
    assert latest_iteration(tmp_path) == STEPS
    before = checkpoint_folder.read_lineage(tmp_path)["tokens"]
    run("1", tmp_path)
    assert checkpoint_folder.read_lineage(tmp_path)["tokens"] > before > 0


def hurried_on_rank(folder: str) -> tuple[str, list[int]]:
    """`fit` under two Ctrl-C in one iteration: how it left, and the iterations that were begun."""
    begun: list[int] = []
    my_batch = test_resume.my_batch

    def interrupting(batch: Any) -> Any:
        begun.append(len(begun) + 1)
        if len(begun) == TERMINATED:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return my_batch(batch)

    test_resume.my_batch = interrupting  # type: ignore[assignment]
    try:
        fit_on_rank({}, 1, folder)
    except KeyboardInterrupt as interrupt:
        return type(interrupt).__name__, begun
    finally:
        test_resume.my_batch = my_batch  # type: ignore[assignment]
    return "finished", begun


def test_a_second_ctrl_c_is_not_waited_for(tmp_path: Path) -> None:
    """Without the command line, as in a notebook, it is Python's own."""
    assert run_on_ranks(hurried_on_rank, 1, str(tmp_path)) == [("KeyboardInterrupt", list(range(1, TERMINATED + 1)))]
    assert latest_iteration(tmp_path) == CUT, "nothing was saved for it"


def saved_on_rank(folder: str, save_interval: int | None) -> list[list[str]]:
    """Which iterations lie in the folder after each checkpoint."""
    seen: list[list[str]] = []
    drop = saving_module.drop_iteration

    def seeing(place: Path, iteration: int) -> None:
        seen.append(sorted(path.name for path in place.glob("iter_*")))
        drop(place, iteration)

    saving_module.drop_iteration = seeing  # type: ignore[assignment]
    try:
        fit_on_rank({}, 1, folder, save_interval=save_interval)
    finally:
        saving_module.drop_iteration = drop
    return [*seen, sorted(path.name for path in Path(folder).glob("*iter_*") if path.is_dir())]


def test_a_run_saves_by_default(tmp_path: Path) -> None:
    """After every tenth, here every iteration; the one before stays until the new one is whole, and then goes."""
    names = [f"iter_{iteration:07d}" for iteration in range(1, STEPS + 1)]
    expected = [list(pair) for pair in itertools.pairwise(names)]
    assert run_on_ranks(saved_on_rank, 1, str(tmp_path / "default"), None) == [[*expected, names[-1:]]]
    assert run_on_ranks(saved_on_rank, 1, str(tmp_path / "asked"), 2) == [[names[1::2]]], "what was asked for stays"
    assert run_on_ranks(saved_on_rank, 1, str(tmp_path / "end"), 0) == [[names[-1:]]]
