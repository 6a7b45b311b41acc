"""Files on disk: which ones an input names, and where output may go."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Callable, Iterable

from minitron_mcore.data.compression import without_ending
from minitron_mcore.data.folders import files_below
from minitron_mcore.errors import InputError
from minitron_mcore.files import not_written
from minitron_mcore.keys import Sources

NO_FILE = "is a pipe, a socket or a device, not a file"
MEND_PATH = "name what is there"


def as_list(value: Sources, key: str) -> list[str]:
    """One string or a list of strings, as a list. Raises InputError, naming `key`, for anything else."""
    items = [value] if isinstance(value, str) else list(value or ())
    if not items or not all(items):
        raise InputError(key, value, "must be a path or a list of paths")
    return items


def find_files(
    inputs: Sources,
    extensions: Iterable[str],
    key: str,
    exclude: Iterable[str] = (),
    report: Callable[[str], None] | None = None,
) -> list[str]:
    """The files that `inputs` names, each once, in an order that depends on names alone.

    Folders are read to the bottom, except those whose name is in `exclude`, for files with one of `extensions`, in
    capitals too and with a compression's ending behind it; links are followed. Files and globs are taken as they are.
    `report` gets a line on what is left out: links that lead nowhere, pipes and the like. Raises InputError, naming
    `key`, for a path that is missing or is not a file, for a folder that is closed, and where no file is left.
    """
    endings = tuple((e if e.startswith(".") else "." + e).lower() for e in extensions)
    skipped = set(exclude)
    files: list[str] = []
    left_out: list[str] = []
    for path in as_list(inputs, key):
        if os.path.islink(path) and not os.path.exists(path):
            raise InputError(key, path, f"is a link to {os.readlink(path)}, which does not exist", MEND_PATH)
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not matches:
            raise InputError(key, path, "does not exist", MEND_PATH)
        if matches == [path] and not os.path.isdir(path) and not os.path.isfile(path):
            raise InputError(key, path, NO_FILE, "write the text, which is read twice, to a file first")
        for match in matches:
            if os.path.isdir(match):
                found, lost = files_below(match, lambda name: _is_asked_for(name, endings), skipped, key)
                files += found
                left_out += lost
            else:
                (files if os.path.isfile(match) else left_out).append(match)
    if left_out and report is not None:
        path, more = left_out[0], f" and {len(left_out) - 1:,} more" if len(left_out) > 1 else ""
        reason = NO_FILE if os.path.exists(path) else f"is a link to {os.readlink(path)}, which does not exist"
        report(f"{key}: {path}{more} left out: it {reason}")
    if not files:
        rule = f"holds no file ending in {', '.join(endings)}"
        raise InputError(key, inputs, rule, f"name others, or set {key.removesuffix('input')}extensions")
    return _each_once(files)


def _is_asked_for(name: str, endings: tuple[str, ...]) -> bool:
    name = name.lower()
    return name.endswith(endings) or without_ending(name).endswith(endings)


def _each_once(files: list[str]) -> list[str]:
    """`files` in their order; of those that are one name in one folder, reached by several links, the shortest path."""
    folders = {folder: os.path.realpath(folder) for folder in {os.path.dirname(path) for path in files}}
    shortest: dict[tuple[str, str], str] = {}
    for path in sorted(dict.fromkeys(files), key=lambda path: path.count(os.sep)):
        shortest.setdefault((folders[os.path.dirname(path)], os.path.basename(path)), path)
    kept = set(shortest.values())
    return [path for path in dict.fromkeys(files) if path in kept]


def check_folder(path: str, key: str, given: str | None = None) -> None:
    """Raise InputError, naming `key`, unless `path` is a folder to write to, or one could be made. Leaves nothing.

    given: the path that the recipe names, where that is a file in the folder.
    """
    named = given or path
    folder = os.path.abspath(path)
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    remedy = "name another, or open it to this user"
    if not os.path.isdir(folder):
        raise InputError(key, named, f"cannot be written, because {folder} is not a folder", "name another")
    if not os.access(folder, os.W_OK):
        raise InputError(key, named, f"cannot be written, because {folder} is closed to this user", remedy)
    if not os.statvfs(folder).f_blocks:
        # Without a disk below, as in /proc, root seems to have a right that does not help: it is tried.
        try:
            os.rmdir(tempfile.mkdtemp(dir=folder))
        except OSError as error:
            rule = f"cannot be written, because no folder can be made in {folder}"
            raise InputError(key, named, rule, "name another") from error


def check_file(path: str, key: str) -> None:
    """Raise InputError, naming `key`, unless a file can be written at `path`. Makes nothing."""
    if os.path.isdir(path):
        raise InputError(key, path, "is a folder", "name a file")
    check_folder(os.path.dirname(path) or ".", key, given=path)


def make_parent(path: str, key: str) -> list[str]:
    """Make the folder that `path` will lie in; returns the folders that were not there before, innermost first.

    Raises InputError, naming `key`, where that cannot be.
    """
    check_file(path, key)
    folder = parent = os.path.dirname(os.path.abspath(path))
    made = []
    while not os.path.isdir(folder):
        made.append(folder)
        folder = os.path.dirname(folder)
    try:
        os.makedirs(parent, exist_ok=True)
    except OSError as error:
        raise not_written(f"{key}={path}", error) from error
    return made
