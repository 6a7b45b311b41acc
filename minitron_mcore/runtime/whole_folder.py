"""A folder that is there whole, or not at all: written beside its place, and renamed when all of it is written."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron_mcore.files import writing
from minitron_mcore.runtime.agree import is_main, on_main

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of renameat2


@contextmanager
def whole_folder(target: Path, called: str) -> Iterator[Path]:
    """Within the `with`, a new folder to fill, which replaces `target`, or becomes it, at the end; every rank calls.

    Whatever is raised within, `target` stays as it was and nothing is left beside it; a killed process leaves the old
    or the new. Raises InputError, which calls the folder `called`, where the disk forbids it. What may not be replaced
    is for the caller to refuse.
    """
    unfinished, old = (target.with_name(f".{target.name}.{word}") for word in ("unfinished", "old"))

    def begin() -> None:
        with writing(called):
            if old.exists() and not target.exists():
                os.replace(old, target)  # killed between the two renames of `_swap`
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)

    def finish() -> None:
        with writing(called):
            if target.exists():
                _swap(unfinished, target, old)
            else:
                os.replace(unfinished, target)
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)

    on_main(begin)
    try:
        yield unfinished
        on_main(finish)
    except BaseException:
        if is_main():
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _swap(unfinished: Path, target: Path, old: Path) -> None:
    """Put `unfinished` at `target`, at once where the system can exchange two names; the old folder is then found under
    one of the other names."""
    names = os.fsencode(unfinished), os.fsencode(target)
    exchange = getattr(ctypes.CDLL(None), "renameat2", None)
    if exchange is not None and exchange(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return
    shutil.rmtree(old, ignore_errors=True)
    os.replace(target, old)
    try:
        os.replace(unfinished, target)
    except BaseException:
        os.replace(old, target)
        raise
