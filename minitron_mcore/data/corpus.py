"""Files on disk: which texts an input names, found and looked at before any is read, and where output may go. Pure."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from os.path import join
from pathlib import Path
from typing import NoReturn

from minitron_mcore.data.config import PreprocessConfig, TokenizerConfig
from minitron_mcore.data.text_file import TEXT, TextFile, inspect_files, without_ending
from minitron_mcore.data.tokenizer import SENTENCEPIECE
from minitron_mcore.errors import InputError
from minitron_mcore.files import writing
from minitron_mcore.keys import Sources

NO_FILE = "is a pipe, a socket or a device, not a file"
MEND_PATH = "name what is there"


@dataclass(frozen=True)
class Texts:
    """Files that can be read, as far as their first bytes tell. key: names them; notes: warnings about them."""

    key: str
    files: tuple[TextFile, ...]
    notes: tuple[str, ...]


def texts_to_train_on(config: TokenizerConfig, key: str = "tokenizer.input") -> Texts:
    """The files of `config.input`, named by `key`, for a new tokenizer in `config.model`. Raises InputError."""
    assert config.model
    if config.type not in (None, SENTENCEPIECE):
        raise InputError("tokenizer.type", config.type, "cannot be trained here", f"use {SENTENCEPIECE}")
    if os.path.exists(config.model) and not config.overwrite:
        remedy = "give another name, or set tokenizer.overwrite=true"
        raise InputError("tokenizer.model", config.model, "exists", remedy)
    check_file(config.model, "tokenizer.model")
    return _texts(config, key)


def texts_to_encode(config: PreprocessConfig, key: str = "preprocess.input") -> Texts:
    """The files of `config.input`, named by `key`, for token files under `config.output_prefix`. Raises InputError."""
    train, held_out = prefixes_of(config)
    texts = _texts(config, key)
    plain = next((file.path for file in texts.files if file.form == TEXT), None)
    if plain and config.json_keys != ["text"]:
        rule = f"cannot be read from plain text such as {plain}, whose only key is text"
        raise InputError("preprocess.json_keys", config.json_keys, rule, "preprocess text and JSON lines apart")
    for prefix in train + held_out:
        if os.path.exists(prefix + ".idx") and not config.overwrite:
            remedy = "give another output_prefix, or set preprocess.overwrite=true"
            raise InputError("preprocess.output_prefix", config.output_prefix, f"would overwrite {prefix}.idx", remedy)
    check_file(train[0], "preprocess.output_prefix")
    return texts


def prefixes_of(config: PreprocessConfig) -> tuple[list[str], list[str]]:
    """(the prefixes that `preprocess` writes, one for each of `json_keys`; those of held-out documents, if any)."""
    train, held_out = (
        [f"{config.output_prefix}{part}_{key}_document" for key in config.json_keys] for part in ("", "_valid")
    )
    return train, held_out if config.valid_fraction else []


def _texts(config: TokenizerConfig | PreprocessConfig, key: str) -> Texts:
    notes: list[str] = []
    section = "tokenizer" if isinstance(config, TokenizerConfig) else "preprocess"
    paths = find_files(config.input, config.extensions, key, config.exclude, notes.append, f"{section}.extensions")
    return Texts(key, tuple(inspect_files(paths, notes.append)), tuple(notes))


def find_files(
    inputs: Sources,
    extensions: Iterable[str],
    key: str,
    exclude: Iterable[str],
    report: Callable[[str], None],
    asked: str = "",
) -> list[str]:
    """The files that `inputs` names, each once, in an order that depends on names alone.

    Folders are read to the bottom, except those whose name is in `exclude`, for files with one of `extensions`, in
    capitals too and with a compression's ending behind it; links are followed. Files and globs are taken as they are.
    `asked`: the key of the extensions, where there is one. `report` gets a line on what is left out: links that lead
    nowhere, pipes and the like. Raises InputError, naming `key`, for a path that is missing or is not a file, for a
    folder that is closed, and where no file is left.
    """
    paths = [inputs] if isinstance(inputs, str) else list(inputs or ())
    if not paths or not all(paths):
        raise InputError(key, inputs, "must be a path or a list of paths")
    endings = tuple((e if e.startswith(".") else "." + e).lower() for e in extensions)
    files: list[str] = []
    left_out: list[str] = []
    for path in paths:
        if os.path.islink(path) and not os.path.exists(path):
            raise InputError(key, path, f"is a link to {os.readlink(path)}, which does not exist", MEND_PATH)
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not matches:
            raise InputError(key, path, "does not exist", MEND_PATH)
        if matches == [path] and not os.path.isdir(path) and not os.path.isfile(path):
            raise InputError(key, path, NO_FILE, "write the text, which is read twice, to a file first")
        for match in matches:
            if os.path.isdir(match):
                found, lost = _files_below(match, endings, set(exclude), key)
                files, left_out = files + found, left_out + lost
            else:
                (files if os.path.isfile(match) else left_out).append(match)
    if left_out:
        path, more = left_out[0], f" and {len(left_out) - 1:,} more" if len(left_out) > 1 else ""
        reason = NO_FILE if os.path.exists(path) else f"is a link to {os.readlink(path)}, which does not exist"
        report(f"{key}: {path}{more} left out: it {reason}")
    if not files:
        rule = f"holds no file ending in {', '.join(endings)}"
        raise InputError(key, inputs, rule, f"name others, or set {asked}" if asked else "name others")
    return _each_once(files)


def _files_below(folder: str, endings: tuple[str, ...], exclude: set[str], key: str) -> tuple[list[str], list[str]]:
    """(files with one of `endings`, what is left out) below `folder`, to the bottom; each folder is entered once.

    Left out are links that lead nowhere, and whatever of such a name is not a file, such as a named pipe, which would
    block for ever. Of each folder first come its files, by name, then its folders, by name, except those whose name is
    in `exclude`. A link to a folder is entered too, unless that folder is read without it, as one above the link is.
    Raises InputError, naming `key`, for a folder that is closed to this user.
    """
    files: list[str] = []
    left_out: list[str] = []
    entered: set[str] = set()
    starts = [folder]  # and links to folders; followed last, so that what lies here is found under its own name
    while starts:
        starts.sort(key=lambda path: path.split(os.sep), reverse=True)
        for parent, folders, names in os.walk(starts.pop(), onerror=partial(_refuse_closed, key)):
            place = os.path.realpath(parent)
            if place in entered:
                folders.clear()
                continue
            entered.add(place)
            starts += [path for name in folders if name not in exclude and os.path.islink(path := join(parent, name))]
            folders[:] = [name for name in folders if name not in exclude]
            for path in (join(parent, name) for name in names):
                is_asked_for = any(each.endswith(endings) for each in (path.lower(), without_ending(path.lower())))
                is_there = os.path.exists(path)
                if os.path.islink(path) and not is_there:
                    left_out.append(path)
                elif is_asked_for:  # where the folder lets nobody look at it, who reads it says so
                    (left_out if is_there and not os.path.isfile(path) else files).append(path)
    return sorted(files, key=_walk_order), sorted(left_out, key=_walk_order)


def _refuse_closed(key: str, error: OSError) -> NoReturn:
    remedy = "open it to this user, or leave it out with exclude"
    raise InputError(key, error.filename, f"cannot be read ({error.strerror})", remedy) from error


def _walk_order(path: str) -> list[tuple[bool, str]]:
    """Where a walk that lists a folder's files before it enters its folders meets the file `path`."""
    *folders, name = path.split(os.sep)
    return [*((True, part) for part in folders), (False, name)]


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
    whole = Path(os.path.abspath(path))
    folder = next(each for each in (whole, *whole.parents) if os.path.lexists(each))
    if not os.path.isdir(folder):
        raise InputError(key, named, f"cannot be written, because {folder} is not a folder", "name another")
    if not os.access(folder, os.W_OK):
        rule = f"cannot be written, because {folder} is closed to this user"
        raise InputError(key, named, rule, "name another, or open it to this user")
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


def make_parent(path: str, key: str) -> list[Path]:
    """Make the folder that `path` will lie in; returns the folders that were not there before, innermost first.

    Raises InputError, naming `key`, where that cannot be.
    """
    check_file(path, key)
    folders = Path(os.path.abspath(path)).parents
    with writing(f"{key}={path}"):
        made = [folder for folder in folders if not folder.is_dir()]
        folders[0].mkdir(parents=True, exist_ok=True)
    return made
