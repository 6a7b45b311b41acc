"""The best candidate of a search in a folder of its own, as `prune` and `distill` would have left it, to go on from."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

from minitron_mcore.checkpoint.folder import BEST, latest_iteration
from minitron_mcore.files import copy_file, writing
from minitron_mcore.jobs.distill import resolve as resolve_distill
from minitron_mcore.jobs.prune import resolve as resolve_prune
from minitron_mcore.jobs.trials import Trial, Trials
from minitron_mcore.recipe import with_keys
from minitron_mcore.runtime.agree import all_or_none
from minitron_mcore.runtime.folder_lock import TRAINING_LOCK
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.runtime.whole_folder import whole_folder
from minitron_mcore.stages import prune
from minitron_mcore.stages.train import describe


def crown(trials: Trials, best: Trial, tokens: int, runtime: Runtime) -> None:
    """Make `trials.winner` of the candidate `best`, trained for `tokens` tokens; every rank calls.

    Where it holds that candidate already, perhaps trained further since, nothing happens. Another one makes room,
    unless it was trained further.
    """
    folder = trials.winner
    distilled, plan, called = folder / "distilled", folder / "plan.json", f"output={folder}"

    def clear() -> bool:
        """Whether there is room for `best` now, which is not there yet."""
        newest = latest_iteration(distilled)
        if newest is not None and plan.is_file() and plan.read_bytes() == best.plan.read_bytes():
            return False
        if newest is not None and newest > trials.stops[-1][0]:
            print(f"WARNING: {folder} holds another candidate, trained further since: {best.folder} is left as it is")
            return False
        with writing(called):
            plan.unlink(missing_ok=True)  # comes last again, when all of it is there
            if distilled.exists():
                shutil.rmtree(distilled)
        return True

    if not runtime.on_main(clear):
        return
    told = {"name": trials.recipe.name, "plan": str(best.plan), "prune.overwrite": True}
    told |= {"student.checkpoint": str(folder / "pruned"), "distill.checkpoint": str(distilled)}
    recipe = with_keys(best.recipe, told)
    prune.run(all_or_none(lambda: resolve_prune(recipe, trials.world)), runtime)
    with whole_folder(distilled, called) as unfinished:
        runtime.on_main(partial(link_checkpoint, best.distilled, unfinished, called))
    job = all_or_none(lambda: resolve_distill(recipe, trials.world))

    def finish() -> None:
        with writing(called):
            describe(job, tokens)
            copy_file(best.plan, plan)

    runtime.on_main(finish)
    runtime.print(f"search: the best candidate, {best.name} -> {distilled}")


def link_checkpoint(source: Path, target: Path, called: str) -> None:
    """Fill the new folder `target` with the checkpoints in `source` and what lies beside them. Files of iterations,
    which nobody writes to again, are the same files (hard links) where the disk has them; others are copies. One
    process calls."""

    def link_or_copy(file: str, new: str) -> None:
        if "iter_" in os.path.relpath(file, source):
            try:
                os.link(file, new)
                return
            except OSError:  # another disk, or one without links
                pass
        shutil.copy2(file, new)

    # A dashboard's own folder belongs to the candidate.
    left_out = shutil.ignore_patterns(TRAINING_LOCK, "wandb", "wandb_run_id", ".unfinished*", BEST)
    with writing(called):
        shutil.copytree(source, target, copy_function=link_or_copy, ignore=left_out, dirs_exist_ok=True)
