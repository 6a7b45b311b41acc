"""The files below a folder, links followed, each folder entered once."""

from __future__ import annotations

import os
from collections.abc import Callable

from minitron_mcore.errors import InputError


def files_below(
    folder: str, is_asked_for: Callable[[str], bool], exclude: set[str], key: str
) -> tuple[list[str], list[str]]:
    """(files whose name `is_asked_for`, what is left out) below `folder`, to the bottom.

    Left out are links that lead nowhere, and whatever of such a name is not a file, such as a named pipe, which would
    block for ever. Of each folder first come its files, by name, then its folders, by name, except those whose name is
    in `exclude`. A link to a folder is entered too, unless that folder is read without it, as one above the link is.
    Raises InputError, naming `key`, for a folder that is closed to this user.
    """
    files: list[str] = []
    left_out: list[str] = []
    entered: set[str] = set()
    links: list[str] = []  # to folders; followed last, so that what lies here is found under its own name
    waiting = [folder]
    while waiting or links:
        if waiting:
            parent = waiting.pop()
        else:
            links.sort(key=lambda path: path.split(os.sep), reverse=True)
            parent = links.pop()
        place = os.path.realpath(parent)
        if place in entered:
            continue
        entered.add(place)
        for entry in _entries(parent, key):
            if os.path.isdir(entry.path):
                if entry.name not in exclude:
                    (links if entry.is_symlink() else waiting).append(entry.path)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                left_out.append(entry.path)
            elif is_asked_for(entry.name):
                (files if entry.is_file() else left_out).append(entry.path)
    return sorted(files, key=_walk_order), sorted(left_out, key=_walk_order)


def _entries(folder: str, key: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        remedy = "open it to this user, or leave it out with exclude"
        raise InputError(key, folder, f"cannot be read ({error.strerror})", remedy) from error


def _walk_order(path: str) -> list[tuple[bool, str]]:
    """Where a walk that lists a folder's files before it enters its folders meets the file `path`."""
    *folders, name = path.split(os.sep)
    return [*((True, part) for part in folders), (False, name)]
