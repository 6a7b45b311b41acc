"""The other files of a Hugging Face folder, which travel with its checkpoints to the next export.

CHECKPOINT/hugging_face/config.json              as it was imported; never that of a pruned shape
                       /generation_config.json   as it was imported, byte for byte
                       /README.md, LICENSE …     and every other file except weights, in its own sub-folder
CHECKPOINT/plan.json                             of a pruned student, and of what is trained from it

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
from minitron_mcore.checkpoint.hf_config import INDEX, SINGLE
from minitron_mcore.checkpoint.manifest import ALGORITHM, MANIFEST
from minitron_mcore.errors import InputError
from minitron_mcore.files import copy_file, reading, write_whole

FOLDER = "hugging_face"
MARKS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What an export writes itself, about the model at hand.
WRITTEN_ANEW = ("config.json", "README.md", MANIFEST)
# Weights in any format, and what a training run keeps beside them.
WEIGHTS = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl"),
    *("*.gguf", "*.ggml", "*.onnx", "*.onnx_data", "*.onnx.data", "*.h5", "*.msgpack", "*.msgpack.index.json", "*.ot"),
    *("*.tflite", "*.nemo", "*.distcp", "*.mlmodel", "*.engine", "*.llamafile"),
)
PASSED_OVER = ("__pycache__", ".*")  # folders
LARGEST = 100_000_000  # bytes of a file; the largest tokenizers and figures take a third of it


def refuse_adapter(source: Path) -> None:
    """Raise InputError if there is an adapter beside the weights of `source`, which would silently be left out."""
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        if (source / name).is_file():
            rule = f"holds {name}, an adapter whose weights are not merged into the model's"
            way = "merge it first (PEFT: merge_and_unload, then save_pretrained), or move its files away to import the "
            raise InputError("hf", source, rule, f"{way}model without it")


def refuse_torn(source: Path) -> None:
    """Raise InputError where a settings file beside the weights and their config is no JSON, as where a download broke
    off: it would be carried into every export."""
    for path in sorted(source.glob("*.json")):
        if path.name in (INDEX, "config.json") or not path.is_file() or path.stat().st_size > LARGEST:
            continue
        with reading(f"hf={path}"):
            content = path.read_bytes()
        try:
            json.loads(content)
        except ValueError as error:
            raise InputError("hf", path, f"is not JSON ({error})", "load that file again, or move it away") from error


def keep_companions(source: Path, checkpoint: Path) -> list[str]:
    """Copy what lies beside the weights of the Hugging Face folder `source` into the checkpoint made from it.

    That is every file except weights, what `checkpoint`/tokenizer has already, and hidden folders. Returns notes on the
    files that are left out.
    """
    other, large, nowhere, named_alike = [], [], [], []
    shards = _json(source / INDEX).get("weight_map")
    imported = {SINGLE, INDEX, *(map(str, shards.values()) if isinstance(shards, dict) else ())}
    for name in paths_below(source):
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
        "other weight files": other,
        f"files of more than {LARGEST // 10**6} MB": large,
        "broken links": nowhere,
        "other programs' files under a name that an export uses": named_alike,
    }
    return [f"not copied: {what}: {', '.join(names)}" for what, names in notes.items() if names]


def carry_companions(source: Path, target: Path) -> None:
    """Copy a checkpoint's companions, if any, into the checkpoint `target` that is made from it."""
    if source.resolve() == target.resolve():
        return
    _copy_all(beside(source, FOLDER), target / FOLDER)
    if (plan := beside(source, "plan.json")).is_file():
        copy_file(plan, target / "plan.json")


def token_ids(checkpoint: Path, ids: dict[str, Any]) -> dict[str, Any]:
    """The marks for config.json: the source's if it has them (one id, several, or null), else `ids`."""
    config = _source_config(checkpoint)
    return {**ids, **{name: config[name] for name in MARKS if name in config}}


def end_tokens(checkpoint: Path, eos: int) -> tuple[int, ...]:
    """The ids that end a text which the exported model generates: the source's, if it names any, else `eos`."""
    beside_weights = beside(checkpoint, FOLDER)
    configs = (_json(beside_weights / "generation_config.json"), _source_config(checkpoint))
    named = next((found for config in configs if (found := config.get("eos_token_id")) is not None), eos)
    return tuple(named) if isinstance(named, list) else (named,)


def stop_at(checkpoint: Path, end: int | None, *, bos: int | None, eos: int) -> None:
    """Have texts that the model generates end at the token `end` too, as answers of a chat template do: written into
    the checkpoint's generation_config.json, which an export takes along.

    end: None: nothing is written. bos, eos: the tokenizer's, which count where the source names none.
    """
    ends = end_tokens(checkpoint, eos)
    if end is None or end in ends:
        return
    marks = token_ids(checkpoint, {"bos_token_id": bos, "eos_token_id": eos})
    path = beside(checkpoint, FOLDER) / "generation_config.json"
    content = {**(_json(path) or {"_from_model_config": True, **marks}), "eos_token_id": [*ends, end]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=2) + "\n")


def tokenizer_class(checkpoint: Path) -> dict[str, str]:
    """The source's `tokenizer_class` in config.json, which transformers uses if the tokenizer names none itself."""
    named = _source_config(checkpoint).get("tokenizer_class")
    return {"tokenizer_class": named} if isinstance(named, str) else {}


def write_companions(checkpoint: Path, folder: Path, ids: dict[str, Any]) -> None:
    """Copy the source's files into a new `folder`, except those about the model itself.

    If the source had no generation_config.json, one is made from `ids`, if there are any.
    """
    _copy_all(beside(checkpoint, FOLDER), folder, WRITTEN_ANEW)
    if ids and not (folder / "generation_config.json").is_file():
        content = json.dumps({"_from_model_config": True, **ids}, indent=2)
        (folder / "generation_config.json").write_text(content + "\n", encoding="utf-8")


def source_card(checkpoint: Path) -> dict[str, Any]:
    """What the source says about itself, for the front matter of a derived model's card.

    `base_model`: its name on the hub, from a hub cache's folder or its config.json, else the base that its own card
    names; `license`, `license_name`, `license_link` and `language` as in its own card. What it does not say is absent.
    """
    card = _front_matter(beside(checkpoint, FOLDER) / "README.md")
    name = _source_name(checkpoint) or card.get("base_model")
    found = {"base_model": name} if name else {}
    return found | {key: card[key] for key in ("license", "license_name", "license_link", "language") if key in card}


def _source_name(checkpoint: Path) -> str | None:
    imported = str(_find(read_lineage(checkpoint), "hf") or "")
    if cached := re.search(r"(?:^|/)models--([\w.-]+?)--([\w.-]+)(?:/|$)", imported):
        return f"{cached[1]}/{cached[2]}"
    stated = str(_source_config(checkpoint).get("_name_or_path") or "")
    # A path on somebody's machine is not a name, though a relative one may look like it.
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
    from huggingface_hub import metadata_load  # late, as it takes a moment to import

    try:
        return metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _source_config(checkpoint: Path) -> dict[str, Any]:
    return _json(beside(checkpoint, FOLDER) / "config.json")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _copy_all(source: Path, target: Path, without: tuple[str, ...] = ()) -> None:
    for name in paths_below(source):
        if name not in without and (source / name).is_file():
            copy_file(source / name, target / name)


def paths_below(folder: Path) -> Iterator[str]:
    """Paths in `folder` of its files and those of its sub-folders, linked ones and broken links included; sorted.

    Each comes once. Hidden folders, caches, and a checkpoint that was put there are skipped.
    """
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        inner = Path(place)
        if inner.resolve() in seen or (inner != folder and TRACKER in files):
            folders.clear()
            continue
        seen.add(inner.resolve())
        folders[:] = sorted(name for name in folders if not any(fnmatch(name, each) for each in PASSED_OVER))
        yield from (str((inner / name).relative_to(folder)) for name in sorted(files))
