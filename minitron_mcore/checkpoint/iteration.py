"""An iteration's folder, from a temporary one, which every rank writes into, to the finished one with its manifest;
and what the user is told where the disk does not let it be written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.api import CheckpointException

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import finish_iteration, unfinished_folder
from minitron_mcore.checkpoint.kept import write_validation
from minitron_mcore.checkpoint.manifest import StoredPiece, bytes_checksum, write_manifest
from minitron_mcore.checkpoint.unpickle import read_metadata
from minitron_mcore.checkpoint.versions import is_object, save_common
from minitron_mcore.checkpoint.way_back import common_part, write_beside
from minitron_mcore.errors import InputError, Interrupted, StorageError
from minitron_mcore.files import nearest_folder, not_written
from minitron_mcore.runtime.start import Runtime

# On a full disk torch.save may report only a broken archive, when the system's own error got lost.
_ARCHIVE_BROKEN = ("inline_container.cc", "PyTorchStreamWriter failed", "iostream error")
_GONE = "Parent directory"  # that "… does not exist", as torch.save puts it


def write_iteration(
    folder: Path,
    iteration: int,
    runtime: Runtime,
    write: Callable[[Path], list[StoredPiece]],
    common: dict[str, Any],
    architecture: Architecture | None,
    called: str | None = None,
    hint: str = "",
) -> None:
    """Have `write` fill a temporary folder, on every rank, and make it the finished `iteration` of `folder`.

    `write` returns the pieces that this rank stored, the first of them weights, and raises on every rank if it does on
    one. `common` is stored beside them, and for an `architecture` what other projects on megatron-core need (see
    way_back.py). All ranks call. After an error nothing of the iteration is left behind. Raises InputError, which calls
    the folder `called`, if it cannot be made, and StorageError, ending with `hint`, if the disk is full.
    """
    made = UnfinishedIteration(folder, iteration, runtime, common, architecture, called, hint)
    with made.whole_or_gone():
        made.begin()
        made.finish(write(made.temporary))


class UnfinishedIteration:
    """The temporary folder of an iteration, from its beginning to its name. As `write_iteration`, in steps, each of
    them within `whole_or_gone`."""

    def __init__(
        self,
        folder: Path,
        iteration: int,
        runtime: Runtime,
        common: dict[str, Any],
        architecture: Architecture | None,
        called: str | None = None,
        hint: str = "",
    ) -> None:
        self.folder, self.iteration, self.runtime = folder, iteration, runtime
        self.common, self.architecture = common, architecture
        self.temporary = unfinished_folder(folder, iteration)
        self._existed, self._told = folder.exists(), (folder, called or str(folder), hint)

    @contextmanager
    def whole_or_gone(self) -> Iterator[None]:
        """After an error within, which every rank must raise, nothing of the iteration is left."""
        try:
            with explaining_disk(*self._told):
                yield
        except (Exception, CheckpointException, Interrupted):
            if self.runtime.is_main:
                shutil.rmtree(self.temporary, ignore_errors=True)
                if not self._existed:
                    shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def begin(self) -> None:
        """Make the folder, empty. All ranks call."""

        def make() -> None:
            with explaining_disk(*self._told):
                shutil.rmtree(self.temporary, ignore_errors=True)
                self.temporary.mkdir(parents=True)

        self.runtime.on_main(make)

    def finish(self, stored: list[StoredPiece]) -> None:
        """Give it its name, once all ranks have written theirs; all call. stored: by this rank, the first of them
        weights."""
        ranks: list[Any] = [stored]
        if self.runtime.world_size > 1:
            ranks = [None] * self.runtime.world_size
            torch.distributed.gather_object(stored, ranks if self.runtime.is_main else None, dst=0)

        def publish() -> None:
            with explaining_disk(*self._told):
                self.common["content_metadata"] = {"iteration": self.iteration}
                if self.architecture is not None:
                    self.common.update(common_part(self.architecture, self.iteration))
                    write_beside(self.temporary, self.architecture, stored[0].dtype if stored else "float32")
                if metrics := self.common.get("progress", {}).get("metrics"):
                    write_validation(self.temporary, metrics)
                save_common(self.common, self.temporary)
                save_config(CheckpointingConfig("torch_dist", 1), str(self.temporary))
                pieces = (piece for rank in ranks for piece in rank)
                write_manifest(self.temporary, pieces, _objects(self.temporary))
                finish_iteration(self.folder, self.temporary, self.iteration)

        self.runtime.on_main(publish)


def _objects(place: Path) -> dict[str, str]:
    """Checksums of the objects stored beside tensors, by key."""
    metadata = read_metadata(place)
    return {
        index.fqn: bytes_checksum(place / info.relative_path, info.offset, info.length)
        for index, info in metadata.storage_data.items()
        if is_object(metadata.state_dict_metadata[index.fqn])
    }


@contextmanager
def explaining_disk(folder: Path, called: str, hint: str = "") -> Iterator[None]:
    """Within, an error of the disk under `folder` is raised as one sentence, which calls the folder `called`: a
    StorageError, ending with `hint`, if the disk is full or broken, else an InputError."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        told = _told(error, folder, called, hint)
        if told is error:
            raise
        raise told from error


def _told(error: BaseException, folder: Path, called: str, hint: str) -> BaseException:
    """What the user sees of an error that torch gathered from the ranks: the first sentence meant for a user."""
    failures = error.failures.values() if isinstance(error, CheckpointException) else [[error]]
    causes = [failure[0] for failure in failures]
    # Sentences for a user come before errors of the disk, whatever rank they are from.
    for cause in sorted(causes, key=lambda cause: not isinstance(cause, InputError)):
        if isinstance(cause, InputError):
            return cause
        if isinstance(cause, OSError):
            return not_written(called, cause, hint)
    for cause in causes:
        words = " ".join(str(cause).split())
        if isinstance(cause, RuntimeError) and any(part in words for part in _ARCHIVE_BROKEN):
            free = f"{shutil.disk_usage(nearest_folder(folder)).free / 1e6:,.1f} MB"
            rule = f"cannot be written: its archive broke off, as on a full disk, which has {free} free ({words[:200]})"
            return StorageError("", called, rule + hint)
        if isinstance(cause, RuntimeError) and _GONE in words:
            return StorageError("", called, f"cannot be written: it has gone ({words[:200]})")
    return error
