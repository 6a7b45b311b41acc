"""What a stage leaves in its folder in the end, as far as two runs of it must have it in common. Pure."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from minitron_mcore.checkpoint.folder import TRACKER
from minitron_mcore.checkpoint.manifest import MANIFEST

# Of numbers, what a clock or the machine says; of files of equal tensors the bytes may differ, and so what names them.
TIMED = re.compile(
    r"time|seconds|\(ms\)|per second|per GPU|slowest rank|memory|utilization|-share|weights$|throughput|elapsed"
)
# Keys of a recipe that a fault asks for, and what is a fingerprint of paths.
GIVEN = re.compile(r"^(watch|on_save_error|wandb\w*|made_with)$")
NAMED = re.compile(r"\b\d+-\d+-[0-9a-f]{32}\b|(?<=weights: )[0-9a-f]{32}\b")  # the files of a checkpoint, in a lineage
LEFT_OVER = re.compile(r"\.unfinished|\.tmp$|\.old$|\.partial$|\.new$")
# Logs of what was done when, pictures, pages, locks, and indices that are made where they are missing.
NOT_COMPARED = re.compile(
    r"(^|/)(journal\.jsonl|report\.html|libraries\.log|sources\.yaml|wandb_run_id|[^/]*\.(png|lock))$"
    r"|^index/|/cache/|/wandb/"
)
PASSING = re.compile(r"/block-\d+\.npy$")  # gone once the pass that it is of is done
IN_ITERATION = re.compile(r"(^|/)iter_(\d+)/")


def outcome(folder: Path, *inputs: Path) -> dict[str, Any]:
    """By file, relative to `folder`: of a checkpoint its newest iteration, by the checksums of its tensors. It does not
    depend on where the folder and those of the inputs lie."""
    found: dict[str, Any] = {}
    for name in files_of(folder):
        if NOT_COMPARED.search(name):
            continue
        if inside := IN_ITERATION.search(name):
            checkpoint = folder / name[: inside.start(2) - len("iter_")]
            if name.endswith(f"/{MANIFEST}") and newest(checkpoint) == int(inside[2]):
                found[name] = json.loads((folder / name).read_text())["tensors"]
            continue
        found[name] = content(folder / name, {str(folder): "<out>", **{str(each): "<inputs>" for each in inputs}})
    return found


def files_of(folder: Path) -> list[str]:
    """Also while others are at work there: what goes in the meantime is left out."""
    found = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return sorted(str(path.relative_to(folder)) for path in found if path.is_file())


def content(path: Path, places: dict[str, str]) -> Any:
    """With other names for the folders."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        # A header of JSON, then the tensors in the order of the header.
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        return header.keys() - {"__metadata__"}, data[8 + size :]
    if path.suffix not in (".json", ".jsonl", ".yaml", ".csv", ".txt", ".md"):
        return data
    text = data.decode()
    for place, name in places.items():
        text = text.replace(place, name)
    text = NAMED.sub("<files>", text)
    if path.suffix == ".jsonl":
        return [without_times(json.loads(line)) if line.endswith("}") else line for line in text.splitlines()]
    if path.name == MANIFEST:
        return json.loads(text).get("tensors")
    try:
        return without_times(yaml.safe_load(text)) if path.suffix in (".json", ".yaml") else text
    except yaml.YAMLError:  # the copy of what was damaged
        return text


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: without_times(each)
            for key, each in value.items()
            if not TIMED.search(str(key)) and not GIVEN.search(str(key))
        }
    if isinstance(value, list):
        return [without_times(each) for each in value]
    return value


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """The files that differ, or that only one of two outcomes has."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def left_over(folder: Path) -> list[str]:
    """What a run that has ended well must have cleared away."""
    return [name for name in files_of(folder) if any(map(LEFT_OVER.search, Path(name).parts))]


def newest(checkpoint: Path) -> int | None:
    try:
        return int((checkpoint / TRACKER).read_text())
    except (OSError, ValueError):
        return None


def finished(folder: Path) -> dict[str, Any]:
    """What is finished for good by now: the newest iteration of each checkpoint, the marks and results that are there,
    and whatever else has its name."""
    found: dict[str, Any] = {}
    for name in files_of(folder):
        if name.endswith(TRACKER):
            found[name] = newest(folder / name.removesuffix(TRACKER)) or 0
        elif not any(each.search(name) for each in (IN_ITERATION, NOT_COMPARED, LEFT_OVER, PASSING)):
            found[name] = True
    return found


def lost(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """What was finished before, and is no more."""
    for name, reached in before.items():
        if name not in after or (name.endswith(TRACKER) and after[name] < reached):
            yield name
