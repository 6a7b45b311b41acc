"""What lies beside a Hugging Face folder's weights and tokenizer, and travels with its checkpoints to the next export.

CHECKPOINT/hugging_face/config.json              as it was imported; never that of a pruned shape
                       /generation_config.json   as it was imported, byte for byte
                       /README.md, LICENSE …     and every other file that is not weights, in its own sub-folder
CHECKPOINT/plan.json                             of a pruned student, and of what is trained onward from it

One process calls; nothing here is a collective.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from minitron_mcore.checkpoint.folder import TRACKER, beside, read_lineage
from minitron_mcore.checkpoint.manifest import ALGORITHM, MANIFEST
from minitron_mcore.checkpoint.safetensors_folder import INDEX, SINGLE
from minitron_mcore.errors import InputError
from minitron_mcore.files import copy_file

FOLDER = "hugging_face"
MARKS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What an export writes itself, of the model that it is.
WRITTEN_ANEW = ("config.json", "README.md", MANIFEST)
# Weights in any form, and what a training run keeps beside them.
WEIGHTS = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl"),
    *("*.gguf", "*.ggml", "*.onnx", "*.onnx_data", "*.onnx.data", "*.h5", "*.msgpack", "*.msgpack.index.json", "*.ot"),
    *("*.tflite", "*.nemo", "*.distcp", "*.mlmodel", "*.engine", "*.llamafile"),
)
PASSED_OVER = ("__pycache__", ".*")  # folders
LARGEST = 100_000_000  # bytes of a file; the largest tokenizers and figures have a third of it


def refuse_adapter(source: Path) -> None:
    """Raise InputError where an adapter lies beside the weights of `source`, which would be left out in silence."""
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        if (source / name).is_file():
            raise InputError(
                f"hf={source} holds {name}, an adapter whose weights are not in those of the model: merge it first "
                "(PEFT: merge_and_unload, then save_pretrained), or move the adapter's files away to import the model "
                "without it"
            )


def keep_companions(source: Path, checkpoint: Path) -> list[str]:
    """Copy what lies beside the weights of the Hugging Face folder `source` into the checkpoint made from it.

    That is every file but weights, what `checkpoint`/tokenizer has already, and hidden folders. Returns what is to be
    said of files that stay behind.
    """
    other, large, nowhere, named_alike = [], [], [], []
    shards = _json(source / INDEX).get("weight_map")
    imported = {SINGLE, INDEX, *(map(str, shards.values()) if isinstance(shards, dict) else ())}
    for name in _paths_below(source):
        if not (source / name).is_file():
            nowhere.append(name)
        elif (checkpoint / "tokenizer" / name).is_file() and name != "config.json":
            continue
        elif any(fnmatch(os.path.basename(name).lower(), pattern) for pattern in WEIGHTS):
            other += [] if name in imported else [name]
        elif (source / name).stat().st_size > LARGEST:
            large.append(name)
        elif name == MANIFEST:  # an export writes its own
            named_alike += [] if _json(source / name).get("checksum") == ALGORITHM else [name]
        else:
            copy_file(source / name, checkpoint / FOLDER / name)
    notes = {
        "other files of weights": other,
        f"files of more than {LARGEST // 10**6} MB": large,
        "links to nothing": nowhere,
        "other programs' files with the name of one that an export writes": named_alike,
    }
    return [f"{what} stay behind: {', '.join(names)}" for what, names in notes.items() if names]


def carry_companions(source: Path, target: Path) -> None:
    """Copy a checkpoint's companions into the checkpoint `target` that is made from it; what has none gives none."""
    if source.resolve() == target.resolve():
        return
    _copy_all(beside(source, FOLDER), target / FOLDER)
    if (plan := beside(source, "plan.json")).is_file():
        copy_file(plan, target / "plan.json")


def token_ids(checkpoint: Path, ids: dict[str, Any]) -> dict[str, Any]:
    """The marks that config.json names: the source's where it says them (one id, several, or null), else `ids`."""
    config = _json(beside(checkpoint, FOLDER) / "config.json")
    return {**ids, **{name: config[name] for name in MARKS if name in config}}


def tokenizer_class(checkpoint: Path) -> dict[str, str]:
    """The source's `tokenizer_class` in config.json, by which transformers reads a tokenizer that names none itself."""
    named = _json(beside(checkpoint, FOLDER) / "config.json").get("tokenizer_class")
    return {"tokenizer_class": named} if isinstance(named, str) else {}


def write_companions(checkpoint: Path, folder: Path, ids: dict[str, Any]) -> None:
    """Put the source's files into a new `folder`, but those that are of the model itself.

    generation_config.json is made, of `ids`, where the source had none and there are any.
    """
    _copy_all(beside(checkpoint, FOLDER), folder, WRITTEN_ANEW)
    if ids and not (folder / "generation_config.json").is_file():
        content = json.dumps({"_from_model_config": True, **ids}, indent=2)
        (folder / "generation_config.json").write_text(content + "\n", encoding="utf-8")


def source_card(checkpoint: Path) -> dict[str, Any]:
    """What the source says of itself, for the front matter of a derived model's card; what it does not say is absent.

    `base_model`: its name on the hub, as a hub cache's folder spells it or its config.json does, else the base that its
    own card names; `license`, `license_name`, `license_link` and `language` as its own card has them.
    """
    card = _front_matter(beside(checkpoint, FOLDER) / "README.md")
    name = _source_name(checkpoint) or card.get("base_model")
    found = {"base_model": name} if name else {}
    return found | {key: card[key] for key in ("license", "license_name", "license_link", "language") if key in card}


def _source_name(checkpoint: Path) -> str | None:
    imported = str(_find(read_lineage(checkpoint), "hf") or "")
    if cached := re.search(r"(?:^|/)models--([\w.-]+?)--([\w.-]+)(?:/|$)", imported):
        return f"{cached[1]}/{cached[2]}"
    stated = str(_json(beside(checkpoint, FOLDER) / "config.json").get("_name_or_path") or "")
    # A path of somebody's machine is no name; one that is relative, and of one folder in another, looks like one.
    is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", stated) and not Path(stated).exists()
    return stated if is_name else None


def _find(lineage: Any, key: str) -> Any:
    """The first value of `key` in a lineage or in those within it."""
    if not isinstance(lineage, dict):
        return None
    if key in lineage:
        return lineage[key]
    return next((found for value in lineage.values() if (found := _find(value, key)) is not None), None)


def _front_matter(card: Path) -> dict[str, Any]:
    if not card.is_file():
        return {}
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    try:
        fields = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip("\ufeff\n ") else None
    except yaml.YAMLError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _copy_all(source: Path, target: Path, without: tuple[str, ...] = ()) -> None:
    for name in files_below(source):
        if name not in without:
            copy_file(source / name, target / name)


def files_below(folder: Path) -> Iterator[str]:
    """Paths in `folder` of its files and those of its sub-folders, linked ones too, each once; sorted.

    Not of hidden folders and caches, nor of a checkpoint that was put there.
    """
    return (name for name in _paths_below(folder) if (folder / name).is_file())


def _paths_below(folder: Path) -> Iterator[str]:
    """Those of `files_below`, and what has a file's place but is none, as a link to nothing."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        inner = Path(place)
        if inner.resolve() in seen or (inner != folder and TRACKER in files):
            folders.clear()
            continue
        seen.add(inner.resolve())
        folders[:] = sorted(name for name in folders if not any(fnmatch(name, each) for each in PASSED_OVER))
        yield from (str((inner / name).relative_to(folder)) for name in sorted(files))
