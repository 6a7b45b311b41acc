"""A disk that is full while a checkpoint is saved: one sentence on every rank, and whole checkpoints alone are left."""

from __future__ import annotations

import errno
import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.distributed.models import start_layout, tiny
from tests.distributed.ranks import run_on_ranks

WEIGHTS = ("__0_0.distcp", "__1_0.distcp")
# What only the first rank writes, but for common.pt, which is opened outside Python.
DESCRIBING = (".metadata.tmp", "metadata.json", "manifest.json.tmp", "latest_checkpointed_iteration.txt.tmp")
_full: list[str] = []


def _watch(event: str, arguments: tuple) -> None:
    if not _full or event != "open" or not str(arguments[0]).endswith(_full[0]):
        return
    if arguments[2] & (os.O_WRONLY | os.O_RDWR):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))


@contextmanager
def unwritable(name: str) -> Iterator[None]:
    """ENOSPC for whoever opens a file of this name to write it."""
    sys.addaudithook(_watch)  # for good, hence without effect once `_full` is empty
    _full[:] = [name]
    try:
        yield
    finally:
        _full.clear()


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: writing fails in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def saves_on_rank(folder: str, world_size: int) -> list[tuple[str, str, list[str]]]:
    """(kind of error, what is said, what is in the folder then) of each way to fail; iteration 1 is whole before."""
    from contextlib import nullcontext

    from minitron_mcore.checkpoint.store import as_chunks, model_state, save_state
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.runtime.start import start

    layout = start_layout({"tensor": world_size}, world_size)
    runtime, target = start(), Path(folder)
    chunks = as_chunks(build_model(tiny("llama"), layout, "fp32"))
    save_state(target, 1, model_state(chunks), runtime)
    ways: list[AbstractContextManager[None]] = [unwritable(name) for name in (*WEIGHTS[:world_size], *DESCRIBING)]
    # The least that is written anew is common.pt, of the first rank.
    ways += [room(20_000) if runtime.rank == rank else nullcontext() for rank in range(world_size)]
    ways += [room(100) if runtime.is_main else nullcontext()]
    found = []
    for way in ways:
        try:
            with way:
                save_state(target, 2, model_state(chunks), runtime)
            kind, said = "", ""
        except BaseException as error:
            # What is free may change from one rank's look to the next.
            kind, said = type(error).__name__, re.sub(r"[\d,.]+ MB free", "… MB free", str(error))
        runtime.barrier()
        found.append((kind, said, sorted(path.name for path in target.iterdir())))
        runtime.barrier()
    save_state(target, 2, model_state(chunks), runtime)
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_save_that_finds_the_disk_full(tmp_path: Path, world_size: int) -> None:
    ranks = run_on_ranks(saves_on_rank, world_size, str(tmp_path / "x"), world_size)
    assert ranks[0] == ranks[-1], "ranks say different things"
    names = [*WEIGHTS[:world_size], *DESCRIBING]
    for number, (kind, said, left) in enumerate(ranks[0]):
        assert kind == "StorageError", said
        assert said.startswith(f"{tmp_path / 'x'} cannot be written: ") and "\n" not in said
        assert said.endswith("; what was saved before is whole: make room, and the same command goes on from there")
        if number < len(names):
            assert "[Errno 28] No space left on device" in said and names[number] in said
        else:
            assert "File too large" in said or "a full disk, which has … MB free" in said
        # The tracker is written when the iteration is whole, and in place.
        finished = ["iter_0000002"] if any("iter_0000002" in name for name in left) else []
        assert left == ["iter_0000001", *finished, "latest_checkpointed_iteration.txt"], left
    assert (tmp_path / "x" / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert (tmp_path / "x" / "iter_0000002" / "metadata.json").is_file()


def tells_on_rank(path: str) -> str:
    """The last rank alone finds the disk full, as one that writes a shard of a cache."""
    from minitron_mcore.errors import StorageError
    from minitron_mcore.files import writing
    from minitron_mcore.runtime.agree import all_or_none
    from minitron_mcore.runtime.start import start

    runtime = start()

    def write() -> None:
        with unwritable(path), writing("a shard"):
            if runtime.rank == runtime.world_size - 1:
                Path(path).write_text("x")

    try:
        all_or_none(write)
    except StorageError as error:
        return f"{error.exit_code}: {error}"
    return ""


def test_every_rank_of_a_cache_fails_as_the_one_that_could_not_write(tmp_path: Path) -> None:
    said = set(run_on_ranks(tells_on_rank, 2, str(tmp_path / "shard")))
    assert said == {f"1: a shard cannot be written: [Errno 28] No space left on device: '{tmp_path}/shard'"}
