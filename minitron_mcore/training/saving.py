"""When a training's checkpoints are written, finished and dropped, and what a save that fails means.

With `async_save` a checkpoint is written while training goes on (checkpoint/store.py: SaveUnderWay) and finished at the
end of a later iteration: when every rank has written its part, when the next one is due, or when the training ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from minitron_mcore.checkpoint.folder import drop_iteration
from minitron_mcore.checkpoint.kept import Kept, settle
from minitron_mcore.checkpoint.store import SaveUnderWay
from minitron_mcore.data.opened import written_over
from minitron_mcore.errors import InputError, StorageError
from minitron_mcore.files import writing
from minitron_mcore.runtime.agree import all_come
from minitron_mcore.runtime.folder_lock import TRAINING_LOCK
from minitron_mcore.runtime.interrupt import made_progress
from minitron_mcore.training.config import TrainConfig
from minitron_mcore.training.job import Job, Progress
from minitron_mcore.training.local_checkpoints import LocalCheckpoints
from minitron_mcore.training.step import Trained

PATIENCE = 10.0  # seconds that a rank which failed waits for the others, before what they write together is lost


class Saver:
    """The checkpoints of a job. Every rank makes one, and calls each method at the same iteration."""

    def __init__(
        self,
        job: Job,
        trained: Trained,
        interim: int | None = None,
        *,
        newest: int = 0,
        local: LocalCheckpoints | None = None,
    ) -> None:
        """interim: the newest iteration, if it is to make room for the next. newest: the newest, 0 for none. local:
        what is kept in nodes besides."""
        self.job, self.trained, self.interim, self.newest, self.local = job, trained, interim, newest, local
        self.kept = kept_by(job.train)
        self.folders = [job.folder] + ([job.teaching.folder] if job.teaching is not None else [])
        self._known = {folder: folder.stat().st_ino for folder in map(Path, self.folders) if folder.is_dir()}
        self._under_way: list[SaveUnderWay] = []  # of one iteration: the teacher's, if it is trained, and the student's
        self._dropping: list[threading.Thread] = []
        self._busy = False
        self._begun = 0.0
        self.seconds = 0.0  # that the newest save took

    @property
    def is_saving(self) -> bool:
        """Whether anything is being written; any thread may ask."""
        return self._busy or bool(self._under_way)

    @property
    def state(self) -> int:
        """How far this rank is with what is being written (`SaveUnderWay.state`)."""
        return max((save.state for save in self._under_way), default=SaveUnderWay.DONE)

    def save(self, progress: Progress, *, at_once: bool) -> None:
        """A checkpoint of the iteration that `progress` has reached, after any that is still being written.

        at_once: it is whole on return, whatever `async_save` says, and a failure is raised, whatever `on_save_error`.
        """
        self.wait()
        self.job.runtime.warn(written_over())
        self._begun = time.monotonic()
        if at_once or not self.job.train.async_save:
            self._try(partial(self._save_now, progress), progress.iteration, raises=at_once)
        else:
            self._try(partial(self._begin, progress), progress.iteration)

    def save_local(self, progress: Progress, *, ends: bool) -> None:
        """A local checkpoint of the iteration that `progress` has reached, if one is due.

        ends: the run does, with a checkpoint that is as new."""
        if self.local is not None and not ends and self.local.is_due(progress.iteration):
            self.local.save(progress, self.newest)

    def attend(self, state: int) -> None:
        """Finish what is being written, if it can be without waiting. state: the largest of all ranks' `state`."""
        if self._under_way and state != SaveUnderWay.WRITING:
            if state == SaveUnderWay.FAILED:
                self._stop()
            self._finish()

    def wait(self) -> None:
        """Finish what is being written, and say how long that took."""
        if self._under_way:
            begun, iteration = time.monotonic(), self._under_way[0].iteration
            self._finish()
            words = f"waited {time.monotonic() - begun:.1f} s for the checkpoint of iteration {iteration}"
            self.job.runtime.print(f"{words}, which was still being written")

    def leave(self, *, in_order: bool) -> None:
        """Once an error has ended the training: finish what is being written, where every rank comes to do so.

        in_order: else the process is to end at once, and what is being written is lost."""
        try:
            if self._under_way and in_order and all_come(within=PATIENCE):
                self.wait()
        except (Exception, CheckpointException) as error:  # the error that ended the training is to be seen
            self.job.runtime.print(f"WARNING: {error}")
        self._stop()
        self._under_way = []
        self.close()

    def close(self) -> None:
        """Wait until what was dropped is gone."""
        for thread in self._dropping:
            thread.join()
        self._dropping = []

    def _stop(self) -> None:
        for save in self._under_way:
            save.stop()

    def _look_for_disk(self) -> None:
        """Raise StorageError where a folder is not the one that there was at the start: a save would make it anew,
        where the disk that it is on is not mounted any more, on the disk below. The first rank calls."""
        for folder in map(Path, self.folders):
            if folder not in self._known and not folder.exists():
                continue  # the first save makes it
            with writing(str(folder)):
                number = folder.stat().st_ino
                if self._known.setdefault(folder, number) != number and not (folder / TRAINING_LOCK).exists():
                    rule = "is another folder than when the training began: is its disk not mounted any more?"
                    raise StorageError("", folder, rule)

    def _describe(self, progress: Progress) -> None:
        """Write what lies beside the weights, which would make the folder anew, too. The first rank calls."""
        self._look_for_disk()
        self.job.describe(progress)

    def _save_now(self, progress: Progress) -> None:
        self.job.runtime.on_main(self._look_for_disk)
        save(self.job, progress, self.trained, partial(self._describe, progress))
        self._make_room(progress.iteration)

    def _begin(self, progress: Progress) -> None:
        self.job.runtime.on_main(self._look_for_disk)
        job, said = self.job, replace(progress)  # which goes on while this one is written
        try:
            if job.teaching is not None:
                self._under_way.append(job.teaching.begin_save(said.iteration, said.consumed_tokens, job.runtime))
            state = vars(said).copy()
            describe = partial(self._describe, said)
            begun = self.trained.begin_save(job.folder, state, job.runtime, job.architecture, describe)
            self._under_way.append(begun)
        except (Exception, CheckpointException):
            self._stop()
            self._under_way = []
            raise

    def _finish(self) -> None:
        under_way, self._under_way = self._under_way, []
        iteration = under_way[0].iteration

        def finish() -> None:
            try:
                while under_way:
                    under_way[0].finish()
                    under_way.pop(0)
            finally:
                for left in under_way:
                    left.stop()
            self._make_room(iteration)

        self._try(finish, iteration)

    def _try(self, work: Callable[[], None], iteration: int, *, raises: bool = False) -> None:
        """Do a save's `work`, which raises on every rank if it does on one."""
        self._busy = True
        try:
            work()
        except InputError as error:  # what can be wrong in a save is the disk, whatever it answers
            if raises or self.job.train.on_save_error == "stop":
                raise StorageError(error.key, error.value, error.rule, error.remedy) from error
            self.job.runtime.print(f"WARNING: no checkpoint of iteration {iteration}, and training goes on: {error}")
        finally:
            self._busy = False
        if not self._under_way:
            self.seconds = time.monotonic() - self._begun

    def _make_room(self, iteration: int) -> None:
        """Count `iteration` as the newest, and drop those that are not to stay beside it."""
        made_progress()
        job, interim, self.interim, self.newest = self.job, self.interim, iteration, iteration
        going = []
        if self.kept is None:
            if job.train.save_interval is not None or interim is None:
                return
            going = [(folder, interim) for folder in self.folders]
        elif job.runtime.is_main:
            try:
                going = settle(self.folders, self.kept)
            except OSError as error:  # what could not be looked at stays
                job.runtime.print(f"WARNING: older checkpoints than iteration {iteration} stay for now: {error}")

        def drop() -> None:
            for folder, number in going:
                drop_iteration(folder, number)

        if not job.train.async_save:
            job.runtime.on_main(drop)
        elif job.runtime.is_main and going:  # to unlink gigabytes takes as long as a step
            self._dropping = [thread for thread in self._dropping if thread.is_alive()]
            self._dropping.append(threading.Thread(target=drop, name="drop"))
            self._dropping[-1].start()


def kept_by(train: TrainConfig) -> Kept | None:
    """Which checkpoints stay by the keys; None where none of them is given: all with `save_interval`, and else what is
    known of this process alone is replaced."""
    if not (train.keep_last or train.keep_every or train.keep_best):
        return None
    last = train.keep_last or (1 if train.save_interval is None else None)
    return Kept(last, train.keep_every, train.keep_best)


def save(job: Job, progress: Progress, trained: Trained, describe: Callable[[], None]) -> None:
    """A checkpoint of the iteration that `progress` has reached; every rank calls. describe: step.py."""
    if job.teaching is not None:
        job.teaching.save(progress.iteration, progress.consumed_tokens, job.runtime)
    trained.save(job.folder, vars(progress).copy(), job.runtime, job.architecture, describe)
