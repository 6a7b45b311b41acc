"""The text files that `tokenizer` and `preprocess` read: found, and looked at, before any is read. Pure."""

from __future__ import annotations

import os
from dataclasses import dataclass

from minitron_mcore.data.config import PreprocessConfig, TokenizerConfig
from minitron_mcore.data.corpus import check_file, find_files
from minitron_mcore.data.text_file import TEXT, TextFile, inspect_files
from minitron_mcore.data.tokenizer import SENTENCEPIECE
from minitron_mcore.errors import InputError


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
    paths = find_files(config.input, config.extensions, key, config.exclude, notes.append)
    return Texts(key, tuple(inspect_files(paths, notes.append)), tuple(notes))
