"""Token files that this process reads, as they were when it opened them. Pure.

Megatron maps them into memory: what is written over them meanwhile is read, in part and unseen. A file that is removed,
or replaced by another of its name, is read on as it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress

_opened: dict[str, tuple[int, int, int]] = {}  # file -> inode, bytes, ns of its last change


def note_opened(prefixes: Iterable[str]) -> None:
    """These pairs of .bin and .idx are read from now on. Any rank calls."""
    for prefix in prefixes:
        for path in (prefix + ".bin", prefix + ".idx"):
            with suppress(OSError):
                _opened[path] = _stamp(path)


def written_over() -> str:
    """A warning of the files that were written over since they were opened, or since this last told of them; "": none
    was. Any rank may call."""
    changed = []
    for path, before in _opened.items():
        with suppress(OSError):  # it is gone, and is read on
            now = _stamp(path)
            if now[0] == before[0] and now != before:
                _opened[path] = now
                changed.append(path)
    if not changed:
        return ""
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    return (
        f"{changed[0]}{more} was written over while it was read: what was read since may be of both texts. To change a "
        "text, write new files, and rename them over the old ones when nothing reads those"
    )


def _stamp(path: str) -> tuple[int, int, int]:
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns
