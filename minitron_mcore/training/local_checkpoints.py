"""Checkpoints in a node's memory or scratch, off the persistent path, with copies on other nodes: what a run that was
killed goes on from, where they are newer than the newest one on the persistent path.

They are nvidia-resiliency-ext's (checkpoint/local_manager.py), which is imported where a training asks for them alone.
DIR/run_id, beside the checkpoints of DIR, tells this run from another one in the same folder.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from minitron_mcore.checkpoint.folder import resumable_iterations
from minitron_mcore.errors import InputError
from minitron_mcore.files import write_whole, writing
from minitron_mcore.runtime.agree import all_or_none, gathered
from minitron_mcore.runtime.libraries import imported
from minitron_mcore.runtime.overlap import finish_gathering
from minitron_mcore.training.job import Job, Progress
from minitron_mcore.training.step import Trained

RUN_ID = "run_id"


class LocalCheckpoints:
    """Those of a job. Every rank makes one, and calls each method at the same iteration."""

    def __init__(self, job: Job, trained: Trained) -> None:
        """Raises InputError, on every rank, where one cannot have its folder."""
        from minitron_mcore.checkpoint.local_state import LocalState

        self.job, train, runtime = job, job.train, job.runtime
        models = {"model": trained, **({"teacher": job.teaching.trained} if job.teaching is not None else {})}
        self.state = LocalState(models)
        self.chunks = [chunk for each in models.values() for chunk in each.chunks]
        jump = train.replication_jump or runtime.local_size
        replication = [jump, train.replication_factor] if train.replication else None
        layout = {**self.state.layout(), "replication": replication}
        run, recipe, session, newest = runtime.on_main(self._identity)
        belongs = {"run": run, "recipe": recipe, "layout": layout}
        library: Any = imported("minitron_mcore.checkpoint.local_manager")
        strategy = library.LazyCliqueReplicationStrategy(*replication) if replication else None
        root = Path(train.non_persistent_local_ckpt_dir or "").absolute()
        self.manager = library.LocalManager(root, session, belongs, strategy, newest)
        self._failed: type[Exception] = library.CheckpointingException
        all_or_none(self._make_folder)

    @classmethod
    def of(cls, job: Job, trained: Trained) -> LocalCheckpoints | None:
        """Those that the keys ask for."""
        return None if job.train.non_persistent_save_interval is None else cls(job, trained)

    def is_due(self, iteration: int) -> bool:
        return iteration % (self.job.train.non_persistent_save_interval or 0) == 0

    def resume(self, newest: int) -> Progress | None:
        """Where the run goes on, with the state of there, if a local checkpoint is newer than iteration `newest`; None,
        and a warning that says why where there is a newer one that cannot be taken."""
        manager, runtime, taken = self.manager, self.job.runtime, None
        found = manager.find_latest()
        there = {each for rank in gathered(self._named()) for each in rank}
        newer = max((number for number, _ in there if number > newest), default=None)
        if newest < found < self.job.ends_at:
            saved, _ = manager.load()
            taken = Progress(**self.state.put(saved))
        reasons = [reason for rank in gathered(sorted(manager.passed_over.values())) for reason in rank]
        if newer is not None and (taken is None or reasons):
            if found >= self.job.ends_at:
                reasons = [f"iteration {found} is not before the last one here, {self.job.ends_at}"]
            elif not reasons:
                lacking = [rank for rank in range(runtime.world_size) if (newer, rank) not in there]
                reasons = [f"of iteration {newer} there is none of {_ranks(lacking)}"]
            more = f", and {len(reasons) - 1} more" if len(reasons) > 1 else ""
            word = "a local checkpoint is" if taken is None else "part of a local checkpoint is"
            runtime.print(f"WARNING: {word} not taken: {reasons[0]}{more}")
        runtime.barrier()  # nothing is deleted while another rank of the node reads
        manager.latest_iteration = -1
        manager.drop(lambda number: taken is None or number != taken.iteration)
        manager.drop_strangers(self._ranks_here)
        return taken

    def save(self, progress: Progress, newest: int) -> None:
        """One of the iteration that `progress` has reached. Where it cannot be written, a warning says so, and training
        goes on with the one before. newest: the iteration of the newest one on the persistent path; 0: none."""
        manager, iteration = self.manager, progress.iteration
        manager.based_on, manager.newest_known = newest, max(newest, manager.newest_known)
        finish_gathering(self.chunks)
        try:
            manager.save(self.state.take(vars(progress).copy()), iteration)
        except self._failed:
            why = [f"rank {rank}: {error}" for rank, error in enumerate(gathered(manager.failure)) if error is not None]
            first = why[0] if why else "ranks are missing"
            self.job.runtime.print(
                f"WARNING: no local checkpoint of iteration {iteration} in {manager.root_local_ckpt_dir}, and training "
                f"goes on: {first}"
            )
        manager.failure = None

    def forget(self) -> None:
        """Delete them: what is on the persistent path is as new."""
        self.job.runtime.barrier()
        self.manager.forget()

    def _identity(self) -> tuple[str, str, str, int]:
        """(this run, its recipe, the folder of its local checkpoints, the newest checkpoint by name, 0 for none)."""
        folder = self.job.folder
        file = folder / RUN_ID
        with writing(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            run = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
            if not run:
                run = secrets.token_hex(16)
                write_whole(file, run + "\n")
        newest = max(resumable_iterations(folder), default=0)
        return run, self.job.identity(), xxhash.xxh3_128_hexdigest(os.fsencode(folder.resolve())), newest

    def _make_folder(self) -> None:
        folder: Path = self.manager.local_ckpt_dir
        what = f"{self.job.stage}.non_persistent_local_ckpt_dir={self.manager.root_local_ckpt_dir}"
        with writing(what):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            strangers = [each for each in (folder, folder.parent) if not _is_own(each)]
        if strangers:
            rule = f"holds {strangers[0].name}, which belongs to another user"
            raise InputError("", what, rule, "name a folder that others cannot write to")

    def _named(self) -> list[tuple[int, int]]:
        """(iteration, rank) of the files that this rank sees, whole or not; without copies, of its own alone."""
        found = set()
        for path in self.manager.local_ckpt_dir.parent.glob("*/iter_*_local.pt"):
            with suppress(ValueError):
                number, rank, _ = self.manager._filename_to_id(path.name)
                if rank == self.job.runtime.rank or self.manager.repl_strategy is not None:
                    found.add((number, rank))
        return sorted(found)

    @cached_property
    def _ranks_here(self) -> list[int]:
        hosts = self.job.runtime.hosts()
        return [rank for rank, host in enumerate(hosts) if host == hosts[self.job.runtime.rank]]


def _is_own(folder: Path) -> bool:
    return not folder.is_symlink() and folder.stat().st_uid == os.geteuid()


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}" if numbers else "some ranks' states"
