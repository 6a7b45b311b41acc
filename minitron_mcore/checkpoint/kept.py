"""Which of a training's checkpoints stay: the newest, those at round iterations, and the best by validation loss. Pure.

run/iter_0000300/validation.json   the losses of the validation at the iteration, or of the nearest one before
run/best -> iter_0000200           a link to the best one, to be named wherever a checkpoint is read
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from minitron_mcore.checkpoint.folder import BEST, finished_iterations, iteration_folder, unfinished_iterations
from minitron_mcore.files import write_whole
from minitron_mcore.runtime.notice import warn

VALIDATION = "validation.json"
# What is trained, where a training logs that by itself; else of the next token.
LOSSES = ("loss validation", "lm loss validation")


@dataclass(frozen=True)
class Kept:
    """last: so many of the newest stay, at least 1; None: all. every: so do the multiples of so many iterations. best:
    so do so many of those with the lowest losses."""

    last: int | None = None
    every: int | None = None
    best: int | None = None

    def dropped(self, finished: list[int], losses: dict[int, float]) -> list[int]:
        """Which of the `finished` iterations go; the newest never does."""
        if self.last is None:
            return []
        stay = set(sorted(finished)[-self.last :]) | set(best_first(finished, losses)[: self.best or 0])
        stay |= {iteration for iteration in finished if self.every and iteration % self.every == 0}
        return sorted(set(finished) - stay)


def best_first(finished: list[int], losses: dict[int, float]) -> list[int]:
    """Those of the `finished` iterations that have a loss, the lowest first. Of two with the same, as those have that
    were saved after one validation, the earlier one is nearer to it, and comes first."""
    return sorted((each for each in finished if each in losses), key=lambda each: (losses[each], each))


def write_validation(iteration: Path, metrics: dict[str, float]) -> None:
    """Keep what the newest validation gave beside the weights, in the folder that is to be `iteration`."""
    numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    write_whole(iteration / VALIDATION, json.dumps(numbers, indent=1) + "\n")


def validation_losses(folder: Path, iterations: list[int]) -> dict[int, float]:
    """The losses by which iterations of `folder` are compared, of those that have one."""
    found = {}
    for iteration in iterations:
        try:
            said = json.loads((iteration_folder(folder, iteration) / VALIDATION).read_text(encoding="utf-8"))
            loss = next(said[name] for name in LOSSES if said.get(name) is not None)
            found[iteration] = float(loss)
        except (OSError, ValueError, TypeError, AttributeError, StopIteration):
            continue  # saved before any validation, or by an older version
    return found


def settle(folders: list[Path], kept: Kept) -> list[tuple[Path, int]]:
    """Have the link `best` name the best iteration, and say which iterations may go, and of which folder.

    folders: of a student and of the teacher that is trained with it, which keeps what the first keeps; the losses are
    the first's. What goes is older than the newest: it may be finished, or left over from a save that was cut off. One
    process calls. Raises OSError.
    """
    finished = finished_iterations(folders[0])
    losses = validation_losses(folders[0], finished)
    if kept.best and (first := best_first(finished, losses)[:1]):
        for folder in folders:
            try:
                point_at(folder, first[0])
            except OSError as error:  # not every file system has links
                warn(f"{folder / BEST} cannot lead to iteration {first[0]}, the best one: {error}")
    stay = set(finished) - set(kept.dropped(finished, losses))
    if kept.last is None:
        return []
    return [
        (folder, iteration)
        for folder in folders
        for iteration in sorted({*finished_iterations(folder), *unfinished_iterations(folder)})
        if iteration not in stay and iteration < finished[-1]
    ]


def point_at(folder: Path, iteration: int) -> None:
    """Make `best` in `folder` a link to `iteration`, in one step. Raises OSError where it cannot be one."""
    link, target = folder / BEST, iteration_folder(folder, iteration).name
    if link.is_symlink() and os.readlink(link) == target:
        return
    unfinished = folder / f".{BEST}.tmp"
    unfinished.unlink(missing_ok=True)
    unfinished.symlink_to(target)
    os.replace(unfinished, link)


def best_iteration(folder: Path) -> int | None:
    """The iteration that `best` names; None where there is no such link."""
    link = folder / BEST
    number = os.readlink(link).removeprefix("iter_") if link.is_symlink() else ""
    return int(number) if number.isdecimal() else None
