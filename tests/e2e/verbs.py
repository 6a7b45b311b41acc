"""Commands as typed, in the reused workers of `run_on_ranks`: exit codes, what the user saw, what was written."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import traceback
import types
from collections.abc import Iterator
from pathlib import Path

from tests.distributed.ranks import run_on_ranks


def command_on_rank(arguments: list[str]) -> tuple[int, str]:
    """Exit code, and what the user saw."""
    from minitron_mcore.cli import main

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        code = main(arguments)
    return code, shown.getvalue()


def minitron(*arguments: str, world_size: int = 1) -> tuple[int, str]:
    """Every rank must leave with the same code; shown is the first rank's."""
    results = run_on_ranks(command_on_rank, world_size, list(arguments))
    assert len({code for code, _ in results}) == 1, results
    return results[0]


def run_well(*arguments: str, world_size: int = 1) -> str:
    """What the command showed; it must end well on every rank."""
    code, shown = minitron(*arguments, world_size=world_size)
    assert code == 0, shown
    return shown


@contextlib.contextmanager
def one_process_group() -> Iterator[None]:
    """Commands one after another, in one process group: to make it takes longer than the work on a tiny model.

    And a group made at once after another, on the same port, may find the other's store.
    """
    from minitron_mcore.runtime import parallel, start

    stop, start.stop = start.stop, parallel.release_layout
    try:
        yield
    finally:
        start.stop = stop


def commands_on_rank(commands: list[list[str]]) -> list[tuple[int, str]]:
    with one_process_group():
        return [command_on_rank(arguments) for arguments in commands]


def all_run_well(commands: list[list[str]], world_size: int = 1) -> None:
    """Commands that all have the same number of ranks; each must end well on every rank."""
    for results in run_on_ranks(commands_on_rank, world_size, commands):
        for arguments, (code, shown) in zip(commands, results, strict=True):
            assert code == 0, (arguments, shown)


def typed(arguments: list[str]) -> tuple[int, str]:
    """Exit code of a command and all that reaches the terminal's stderr, C++'s included. Runs in a worker."""
    from minitron_mcore import cli

    cli.time = types.SimpleNamespace(sleep=lambda seconds: None)  # type: ignore[assignment]  # no launcher to wait for
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            code = cli.main(arguments)
        except SystemExit as leaving:
            code = int(str(leaving.code))
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
        written.seek(0)
        return code, written.read().decode()


def all_typed(commands: list[list[str]], root: Path) -> list[tuple[int, str, bool]]:
    """Each command's exit code, its stderr, and whether it left everything below `root` as it was."""
    results = []
    before = snapshot(root)
    for words in commands:
        wait_for_all()
        try:
            with one_process_group():
                code, shown = typed(words)
        except BaseException:
            code, shown = 1, traceback.format_exc()
        wait_for_all()
        after = snapshot(root)
        results.append((code, shown, after == before))
        before = after
    return results


def wait_for_all() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of everything below, by path; a folder's time tells of names made and gone again."""
    found = {}
    for folder, folders, files in os.walk(root):  # several times as quick as Path.rglob
        for path in (os.path.join(folder, name) for name in (*folders, *files)):
            state = os.lstat(path)
            found[path] = (state.st_mtime_ns, state.st_size)
    return found
