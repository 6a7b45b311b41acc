"""From which checkpoint a training goes on: the newest one that is whole, by every byte of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from minitron_mcore.checkpoint.folder import iteration_folder, mark_newest, resumable_iterations
from minitron_mcore.checkpoint.integrity import damaged_files, damaged_pieces
from minitron_mcore.errors import InputError
from minitron_mcore.runtime.agree import all_come, gathered
from minitron_mcore.runtime.start import Runtime


def find_whole(folders: list[Path], runtime: Runtime) -> int | None:
    """The newest iteration that is whole in each of the `folders`, a student's and that of the teacher that is trained
    with it; None where there is none at all. Every rank calls, and reads what it wrote, or another share of the bytes,
    once more.

    A damaged one is skipped with a warning that names the file, and counts no more as the newest. Raises InputError, on
    every rank, where all are damaged: nothing has been written then.
    """

    def go_back(iteration: int) -> None:
        for folder in folders:
            mark_newest(folder, iteration)

    candidates, damage = runtime.on_main(partial(resumable_iterations, folders[0])), ""
    for iteration in candidates:
        faults = _faults([iteration_folder(folder, iteration) for folder in folders], runtime)
        if not faults:
            if iteration != candidates[0]:
                runtime.on_main(partial(go_back, iteration))
            return iteration
        damage = f"{faults[0]}{f', and {len(faults) - 1:,} more' if len(faults) > 1 else ''}"
        runtime.print(f"WARNING: the checkpoint of iteration {iteration} is skipped, for it is damaged: {damage}")
    if candidates:
        rule = f"holds no checkpoint that is whole; of the oldest, {damage}"
        raise InputError("", folders[0], rule, "restore one, or name another folder to begin anew")
    return None


def _faults(places: list[Path], runtime: Runtime) -> list[str]:
    """What is damaged there, one sentence each, the same on every rank."""
    # What costs no reading comes first.
    if faults := runtime.on_main(lambda: [fault for place in places for fault in damaged_files(place)]):
        return faults
    share = runtime.rank, runtime.world_size
    mine = [fault for place in places for fault in damaged_pieces(place, share, runtime.progress)]
    all_come()  # not in a collective, which would run into its time limit
    return [fault for rank in gathered(mine) for fault in rank]
