"""Which files in a folder make up a tokenizer, and what those beside a SentencePiece model change in it. Pure.

added_tokens.json and special_tokens_map.json are what transformers wrote before it had tokenizer.json. Beside a
SentencePiece model they may change nothing, or add ids (a chat's marks) and name another end of sentence. A model so
changed is read as a Hugging Face tokenizer.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Optional

from minitron_mcore.errors import InputError
from minitron_mcore.files import copy_file, refuse_closed

MODEL = "tokenizer.model"
ADDED, SPECIAL = "added_tokens.json", "special_tokens_map.json"
# Any of these makes a folder one with a tokenizer; the others say how it is used. Old fingerprints take this order.
VOCABULARY_FILES = ("tokenizer.json", MODEL, "vocab.json", "merges.txt", "vocab.txt")
TEMPLATES = "additional_chat_templates/*.jinja"  # of a tokenizer with several, by name
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", TEMPLATES)
SETTINGS_FILES = (SPECIAL, ADDED, *TEMPLATE_FILES, "tekken.json")
# What transformers alone reads.
CONFIG_FILES = ("tokenizer_config.json", "tokenizer.*.json")
FILES = VOCABULARY_FILES + SETTINGS_FILES + CONFIG_FILES


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
    return any(os.path.isfile(os.path.join(folder, name)) for name in VOCABULARY_FILES)


def is_hugging_face(folder: str) -> bool:
    """Whether transformers is to read the tokenizer in `folder`, rather than sentencepiece the tokenizer.model in it.

    Raises InputError where what lies beside a tokenizer.model cannot be read.
    """
    present = {name for name in (*VOCABULARY_FILES, *CONFIG_FILES) if os.path.isfile(os.path.join(folder, name))}
    if MODEL not in present:
        return bool(present)
    return bool(present & {"tokenizer.json", "tokenizer_config.json"}) or changed_by(os.path.join(folder, MODEL)) != ()


def changed_by(model: str) -> tuple[str, ...]:
    """The files beside the SentencePiece `model` that give ids or marks which it has not; raises InputError.

    A name that the model itself takes as one piece (of type control, unknown or user-defined) at that id is no change.
    """
    folder = os.path.dirname(model) or "."
    added, special = read_names(folder, ADDED), read_names(folder, SPECIAL)
    if os.path.basename(model) != MODEL or not (added or special):
        return ()
    try:
        proto = parse_model(Path(model).read_bytes())
    except Exception:  # no SentencePiece model: who loads it says so
        return ()
    whole = {
        piece.piece: index
        for index, piece in enumerate(proto.pieces)
        if piece.type in (piece.UNKNOWN, piece.CONTROL, piece.USER_DEFINED)
    }
    own = {f"{mark}_token": getattr(proto.trainer_spec, f"{mark}_id") for mark in ("bos", "eos", "unk")}
    changes = {
        ADDED: any(whole.get(name) != number for name, number in added.items()),
        SPECIAL: any(
            name not in whole or (key in own and whole[name] != own[key])
            for key, value in special.items()
            for name in _contents(value)
        ),
    }
    return tuple(name for name, is_change in changes.items() if is_change)


def parse_model(proto: bytes) -> Any:
    """A serialized SentencePiece model, taken apart."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(proto)  # type: ignore[attr-defined]  # made at import


def read_names(folder: str, file: str) -> dict[str, Any]:
    """The mapping in added_tokens.json or special_tokens_map.json; empty where there is none. Raises InputError."""
    path = os.path.join(folder, file)
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as stream:
            names = json.load(stream)
    except (OSError, ValueError) as error:
        raise InputError("", path, f"cannot be read ({error})", "mend it, or move it away") from error
    if not isinstance(names, dict):
        raise InputError("", path, f"holds a {type(names).__name__}, not a mapping of names", "move it away")
    return names


def _contents(value: Any) -> list[str]:
    """The tokens in a value of special_tokens_map.json: one or several, each its text or a mapping with `content`."""
    if isinstance(value, (list, tuple)):
        return [name for each in value for name in _contents(each)]
    content = value.get("content") if isinstance(value, dict) else value
    return [content] if isinstance(content, str) and content else []


def files_of(folder: str, patterns: tuple[str, ...]) -> list[str]:
    """The paths in `folder` of the files that any of `patterns` names."""
    found = {path for pattern in patterns for path in Path(folder).glob(pattern) if path.is_file()}
    return sorted(str(path.relative_to(folder)) for path in found)


def copy_files(source: str, target: str, patterns: tuple[str, ...]) -> None:
    """Copy those that `patterns` name of the files in the folder `source` into the folder `target`, byte for byte.

    Raises InputError where a folder of them is closed to this user.
    """
    for place in sorted({os.path.join(source, os.path.dirname(pattern)) for pattern in patterns}):
        refuse_closed(source, place)  # in which glob finds nothing
    for name in files_of(source, patterns):
        copy_file(os.path.join(source, name), os.path.join(target, name))


def check_added(folder: str, id_of: Any) -> None:
    """Raise InputError where transformers gives an added token another id than added_tokens.json, its only source."""
    if os.path.isfile(os.path.join(folder, "tokenizer.json")):
        return
    for name, number in read_names(folder, ADDED).items():
        if not isinstance(number, int):
            rule = f"gives {name!r} the id {number!r}, which is not a whole number"
            raise InputError("", os.path.join(folder, ADDED), rule, "mend it")
        found: Optional[int] = id_of(name)
        if found != number:
            rule = f"has an {ADDED} that gives {name!r} the id {number}, which transformers reads as {found}"
            remedy = "save the tokenizer with transformers, as a tokenizer.json of the model's ids"
            raise InputError("tokenizer.model", folder, rule, remedy)
