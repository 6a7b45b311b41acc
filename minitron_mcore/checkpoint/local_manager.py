"""nvidia-resiliency-ext's manager of local checkpoints, over files that are known to be whole and of this run.

    DIR/<session>/<rank>/iter_0000040_3_local.pt      rank 3's state of iteration 40, its own or a copy

The library replicates, finds the newest iteration that all ranks have between them, and fetches what a rank lacks. It
trusts every file of the right name, and unpickles it whatever it asks for; here a file counts if it is whole and says
that it belongs to this run (local_file.py). It also waits forever where one rank alone cannot write, and writes what is
still on its way from a GPU.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.base_manager import CheckpointingException, CkptID
from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import LocalCheckpointManager
from nvidia_resiliency_ext.checkpointing.local.replication.strategies import LazyCliqueReplicationStrategy

from minitron_mcore.checkpoint.local_file import LocalFileError, read_about, read_local, write_local
from minitron_mcore.checkpoint.local_state import CLASSES
from minitron_mcore.runtime.agree import gathered

__all__ = ["CheckpointingException", "LazyCliqueReplicationStrategy", "LocalManager"]
_Stamp = tuple[int, int, int]


class LocalManager(LocalCheckpointManager):
    """The files of this rank, below the session's folder of `root`.

    belongs: what each file must say that it belongs to, and what is written into it. based_on: the newest iteration on
    the persistent path, beside which a file was written; one that is not there any more is passed over.
    """

    def __init__(self, root: Path, session: str, belongs: dict[str, Any], strategy: Any, based_on: int) -> None:
        super().__init__(root, session, strategy)
        self.belongs, self.based_on, self.newest_known = belongs, based_on, based_on
        self.passed_over: dict[str, str] = {}  # why, by file
        self.failure: OSError | None = None  # of the newest save
        self._whole: dict[Path, _Stamp] = {}
        self._found: dict[CkptID, Path] = {}

    def find_latest(self) -> int:
        """The newest iteration that all ranks have between them; -1: none, and after a save of which any rank could not
        write a file: it then fails on all, and the one before stays, with its copies. All ranks call."""
        failed = any(gathered(self.failure is not None))
        found: int = super().find_latest()
        if failed:
            self.latest_iteration = found = -1
        return found

    def _my_ckpt_ids(self) -> Iterable[CkptID]:
        """Those of this rank's folder; and its own, where another rank of this node has them, as after ranks have
        changed places."""
        self._found = {}
        mine = f"iter_*_{self.rank}_local.pt"
        for path in [*self._listed(self.local_ckpt_dir, "*"), *self._listed(self.local_ckpt_dir.parent, f"*/{mine}")]:
            try:
                ckpt_id = self._filename_to_id(path.name)
                if ckpt_id not in self._found and self._counts(path, ckpt_id):
                    self._found[ckpt_id] = path
            except (LocalFileError, OSError, ValueError) as error:
                self.passed_over[str(path)] = str(error)
        return list(self._found)

    def _listed(self, folder: Path, pattern: str) -> list[Path]:
        with suppress(OSError):
            return sorted(path for path in folder.glob(pattern) if path.name.endswith("_local.pt"))
        return []

    def _counts(self, path: Path, ckpt_id: CkptID) -> bool:
        status = path.stat()
        stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
        if self._whole.get(path) == stamp:
            return True
        about = read_about(path, whole=False)
        reason = self._unlike(about, ckpt_id)
        if reason is None:
            read_about(path)
            self._whole[path] = stamp
            return True
        self.passed_over[str(path)] = f"{path} {reason}"
        return False

    def _unlike(self, about: dict[str, Any], ckpt_id: CkptID) -> str | None:
        """Why a file does not count; None: it does."""
        if (about.get("iteration"), about.get("rank")) != ckpt_id[:2]:
            return "has another name than it was written under"
        if about.get("run") != self.belongs["run"]:
            return "is of another run"
        if about.get("recipe") != self.belongs["recipe"]:
            return "is of another recipe"
        if about.get("layout") != self.belongs["layout"]:
            there, here = about.get("layout") or {}, self.belongs["layout"]
            unlike = [name for name in here if there.get(name) != here[name]]
            words = [f"{name} {there.get(name)} there and {here[name]} here" for name in unlike if name != "state"]
            return f"is of another layout: {', '.join(words) or 'the state lies otherwise on the ranks'}"
        if int(about.get("based_on", 0)) > self.newest_known:
            return f"was written after iteration {about['based_on']}, which is not there any more"
        return None

    def _save(self, state_dict: Any, ckpt_id: CkptID) -> None:
        """Raises nothing: `find_latest`, with which the library ends a save, tells the other ranks."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the library's copies to the host are still under way, and it does not wait
        path = self._local_ckpt_path_from_id(ckpt_id)
        about = {**self.belongs, "iteration": ckpt_id[0], "rank": ckpt_id[1], "based_on": self.based_on}
        try:
            self.local_ckpt_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_local(path, about, state_dict)
            status = path.stat()
            self._whole[path] = (status.st_ino, status.st_size, status.st_mtime_ns)
        except (OSError, RuntimeError) as error:  # torch's archive breaks off
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            self.failure = cause if isinstance(cause, OSError) else OSError(str(error).splitlines()[0])

    def _load(self, ckpt_id: CkptID) -> Any:
        try:
            return read_local(self._found[ckpt_id], CLASSES)
        except (LocalFileError, OSError, KeyError) as error:
            raise CheckpointingException(f"{ckpt_id} cannot be read: {error}") from error

    def _cleanup(self, iteration: int) -> None:
        self.drop(lambda number: number < iteration)

    def _cleanup_failed_save(self, iteration: int) -> None:
        self.drop(lambda number: number == iteration)

    def drop(self, is_to_go: Any) -> None:
        """Delete this rank's files of the iterations that are to go, and what was being written."""
        for path in [*self.local_ckpt_dir.glob("iter_*_local.pt"), *self.local_ckpt_dir.glob("*.tmp")]:
            with suppress(OSError, ValueError):
                if path.suffix == ".tmp" or is_to_go(self._filename_to_id(path.name)[0]):
                    path.unlink()
                    self._whole.pop(path, None)

    def forget(self) -> None:
        """Delete all of this rank's files, and the session's folder with the last of them."""
        shutil.rmtree(self.local_ckpt_dir, ignore_errors=True)
        with suppress(OSError):
            self.local_ckpt_dir.parent.rmdir()

    def drop_strangers(self, here: Iterable[int]) -> None:
        """Delete the files of ranks that are not on this node, as those `here` are, and may have been."""
        left = self._listed_ranks()
        for rank in left.keys() - set(here):
            shutil.rmtree(left[rank], ignore_errors=True)

    def _listed_ranks(self) -> dict[int, Path]:
        with suppress(OSError):
            return {int(path.name): path for path in self.local_ckpt_dir.parent.iterdir() if path.name.isdecimal()}
        return {}
