"""Text on disk: which files an input names, the documents in them, and where output may go.

A document is a whole text file, or one line of a .jsonl file. Bytes that are not UTF-8 become U+FFFD.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from minitron_mcore.errors import InputError


def as_list(value: Any, key: str) -> list[str]:
    """One string or a list of strings, as a list. `key` is named in the InputError for anything else."""
    items = [value] if isinstance(value, str) else value
    if items is None or not isinstance(items, Iterable) or isinstance(items, dict):
        raise InputError(f"{key}={value!r} must be a path or a list of paths")
    items = list(items)
    if not items or not all(isinstance(item, str) and item for item in items):
        raise InputError(f"{key}={items!r} must be a path or a list of paths")
    return items


def find_files(inputs: Any, extensions: Iterable[str], key: str, exclude: Iterable[str] = ()) -> list[str]:
    """The files that `inputs` names, each once, in an order that depends on names alone.

    Folders are read to the bottom for files with one of `extensions`, but for folders whose name is in `exclude`; files
    and globs are taken as they are.
    Raises InputError, naming `key`, for a path that is not there and where no file is left.
    """
    endings = tuple(e if e.startswith(".") else "." + e for e in extensions)
    skipped = set(exclude)
    files: list[str] = []
    for path in as_list(inputs, key):
        if os.path.isdir(path):
            files += _files_below(path, endings, skipped)
        elif os.path.isfile(path):
            files.append(path)
        else:
            matches = sorted(glob.glob(path, recursive=True))
            if not matches:
                raise InputError(f"{key}: {path} does not exist")
            for match in matches:
                files += _files_below(match, endings, skipped) if os.path.isdir(match) else [match]
    if not files:
        raise InputError(
            f"{key}={inputs!r} holds no file ending in {', '.join(endings)}; give others or set extensions"
        )
    return list(dict.fromkeys(files))


def _files_below(folder: str, endings: tuple[str, ...], exclude: set[str]) -> list[str]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in exclude)
        found += [os.path.join(parent, name) for name in sorted(names) if name.endswith(endings)]
    return found


def check_folder(path: str, key: str) -> None:
    """Raise InputError, naming `key`, unless `path` is a folder to write to, or one could be made. Makes nothing."""
    folder = os.path.abspath(path)
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise InputError(f"{key}={path} cannot be written: {folder} is not a folder")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{key}={path} cannot be written: the folder {folder} is not open to you")


def check_file(path: str, key: str) -> None:
    """Raise InputError, naming `key`, unless a file can be written at `path`. Makes nothing."""
    if os.path.isdir(path):
        raise InputError(f"{key}={path} is a folder: name a file")
    check_folder(os.path.dirname(path) or ".", key)


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
        raise InputError(f"{key}={path}: the folder {parent} cannot be made: {error.strerror}") from error
    return made


def is_jsonl(path: str) -> bool:
    return path.endswith((".jsonl", ".json"))


def read_text(path: str) -> str:
    """A whole text file, its line ends untouched."""
    try:
        with open(path, "rb") as stream:
            return stream.read().decode("utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def read_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of a .jsonl file, blank lines left out."""
    try:
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def json_texts(line: bytes, keys: Iterable[str], path: str, number: int) -> list[str]:
    """The texts under `keys` in one line of a .jsonl file. Raises InputError with file and line number."""
    try:
        record = json.loads(line.decode("utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {number}, is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(record, dict):
        raise InputError(f"{path}, line {number}, holds a {type(record).__name__}; each line must be an object")
    texts = []
    for key in keys:
        if key not in record:
            raise InputError(f"{path}, line {number}, has no key {key!r} (it has {sorted(record)}); set json_keys")
        if not isinstance(record[key], str):
            raise InputError(
                f"{path}, line {number}: {key!r} is of type {type(record[key]).__name__}; it must be a string"
            )
        # JSON may spell half of a surrogate pair, which no tokenizer accepts
        texts.append(record[key].encode("utf-8", errors="replace").decode("utf-8"))
    return texts


def documents(files: Iterable[str], json_key: str) -> Iterator[str]:
    """Every document of `files`, in order."""
    for path in files:
        if is_jsonl(path):
            for number, line in read_lines(path):
                yield json_texts(line, [json_key], path, number)[0]
        else:
            yield read_text(path)
