"""What a folder of weights, of a run, or of a search, is, and whether it is whole.

Judged by names, shapes and sizes; integrity.py reads the tensors. Nothing here is a collective, and nothing writes.
Every function returns a mapping that JSON can hold, or raises InputError naming the file and tensor that are wrong.
"""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import yaml

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.checkpoint.conversion import units
from minitron_mcore.checkpoint.folder import (
    TRACKER,
    beside,
    checkpoints_within,
    find_checkpoint,
    is_iteration,
    iteration_folder,
    latest_iteration,
    read_architecture,
    read_lineage,
    said_by,
)
from minitron_mcore.checkpoint.hf_config import read_config
from minitron_mcore.checkpoint.kept import best_iteration
from minitron_mcore.checkpoint.manifest import type_name
from minitron_mcore.checkpoint.reader import TensorReader
from minitron_mcore.checkpoint.safetensors_folder import SafetensorsFolder
from minitron_mcore.errors import InputError
from minitron_mcore.files import first_line, read_mapping, reading
from minitron_mcore.layout import parameter_table


def is_checkpoint(folder: Path) -> bool:
    return (folder / "architecture.yaml").is_file() or (folder / TRACKER).is_file() or any(folder.glob("iter_*"))


def is_run(folder: Path) -> bool:
    """Whether `minitron run` wrote it."""
    return (folder / "recipe.yaml").is_file() and (folder / "done").is_dir()


def inspect_run(folder: Path) -> dict[str, Any]:
    """The parts of a folder that `minitron run` wrote; any one process calls."""
    done = sorted((folder / "done").glob("*.json"), key=lambda path: path.stat().st_mtime)
    return {
        "path": str(folder),
        "kind": "run",
        "recipe": str(folder / "recipe.yaml"),
        "steps_done": [path.stem for path in done],
        "checkpoints": [str(path) for path in checkpoints_within(folder)],
        "files": sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != "recipe.yaml"),
        "warnings": [],
    }


CANDIDATES = "candidates.json"
# What is told of each of a search's candidates.
TOLD = ("rank", "total_parameters", "zero_shot", "loss", "tokens", "diverged")


def is_search(folder: Path) -> bool:
    """Whether `minitron search` wrote it."""
    return (folder / CANDIDATES).is_file()


def inspect_search(folder: Path) -> dict[str, Any]:
    """What a search in `folder` has listed, what became of each candidate so far, and the winner; any one process
    calls. A rank is known once the search has ended. Raises InputError for a list that cannot be read."""
    listed, warnings = _json(folder / CANDIDATES), []
    try:
        teacher, rows = build_architecture(listed["teacher"]), {str(row["name"]): row for row in listed["candidates"]}
    except (InputError, KeyError, TypeError) as error:
        raise InputError("", folder / CANDIDATES, "is not the list of a search, or is damaged") from error
    results = {path.parent.name: _json(path) for path in sorted((folder / "candidates").glob("*/result.json"))}
    if others := results.keys() - rows.keys():
        warnings.append(f"{', '.join(sorted(others))}: tried before, and not in the grid that {CANDIDATES} lists")
    plan, best = folder / "winner" / "plan.json", None
    if plan.is_file():
        same = (path.parent.name for path in (folder / "candidates").glob("*/plan.json") if _is_same(path, plan))
        best = next(same, None)
    candidates = {name: row | results.get(name, {}) for name, row in rows.items()}
    return {
        "path": str(folder),
        "kind": "search",
        "teacher": describe_architecture(teacher),
        "budgets": listed.get("budgets", {}),
        "combinations": listed.get("combinations"),
        "shapes": listed.get("shapes"),
        "listed": len(rows),
        "evaluated": len(results),
        "trained": sum(result.get("tokens", 0) > 0 for result in results.values()),
        "candidates": {name: {key: row.get(key) for key in TOLD} for name, row in candidates.items()},
        "correlation": listed.get("correlation"),
        "winner": best,
        "checkpoints": [str(path) for path in checkpoints_within(folder)],
        "files": sorted(path.name for path in folder.iterdir() if path.is_file()),
        "warnings": warnings,
    }


def _json(path: Path) -> dict[str, Any]:
    with reading(str(path)):
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError("", path, "is not JSON", first_line(error)) from error
    if not isinstance(found, dict):
        raise InputError("", path, "is not JSON that holds names and values")
    return found


def _is_same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def describe_architecture(architecture: Architecture) -> dict[str, Any]:
    return {
        "architecture": architecture.to_dict(),
        "parameters": architecture.num_parameters,
        "non_embedding_parameters": architecture.num_non_embedding_parameters,
    }


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """Description of a checkpoint folder or of one iteration of it, whoever wrote it; any one process calls.

    The newest finished iteration must have every tensor of the layout table in its global shape, in files as long as
    `.metadata` says. Raises InputError if it does not, or if no iteration is finished; faults of an older iteration are
    warnings.
    """
    architecture = read_architecture(folder)
    leftovers = sorted(path.name for path in folder.glob(".unfinished_iter_*"))
    names = [path.name.removeprefix("iter_") for path in folder.glob("iter_*")]
    iterations = sorted(int(name) for name in names if name.isdecimal())
    newest = latest_iteration(folder)
    if is_iteration(folder):
        newest = find_checkpoint(folder, "path")[1]
        iterations = [newest]
    if newest is None:
        lying = [*(iteration_folder(folder, iteration).name for iteration in iterations), *leftovers]
        there = f"; it holds {', '.join(lying)}" if lying else ""
        raise InputError("", folder, f"holds no finished checkpoint: {TRACKER} is missing{there}")
    stored = check_iteration(folder, newest, architecture)
    warnings = []
    for iteration in (number for number in iterations if number < newest):
        try:
            check_iteration(folder, iteration, architecture)
        except InputError as error:
            warnings.append(str(error))
    ignored = f"is ignored: {TRACKER} names {newest} as the newest finished one"
    warnings += [f"iteration {iteration} {ignored}" for iteration in iterations if iteration > newest]
    warnings += [f"{name} is left over from an interrupted save: it may be deleted" for name in leftovers]
    recipe = beside(folder, "recipe.yaml")
    is_ours = beside(folder, "architecture.yaml").is_file()
    # torch_dist names its files by the rank that wrote them: __RANK_NUMBER.distcp.
    files = [file.name for file in iteration_folder(folder, newest).glob("__*.distcp")]
    return {
        "path": str(folder),
        "kind": "checkpoint" if is_ours else "megatron",
        **({} if is_ours else {"described_by": said_by(folder)}),
        **describe_architecture(architecture),
        "iterations": iterations,
        "newest_finished": newest,
        "best": best_iteration(folder),
        "unfinished": leftovers,
        **stored,
        "saved_at": read_mapping(recipe).get("parallel") if recipe.is_file() else None,
        "lineage": read_lineage(folder),
        "files": len(files),
        "written_by_ranks": len({name.split("_")[2] for name in files}),
        "warnings": warnings,
    }


def check_iteration(folder: Path, iteration: int, architecture: Architecture) -> dict[str, Any]:
    """Stored dtypes, bytes, and whether an optimizer is stored too; raises InputError if the iteration is damaged.

    This finds missing tensors, other shapes, parts that do not add up to a tensor, and missing or shortened files, but
    not changed bytes.
    """
    place = iteration_folder(folder, iteration)
    if not (place / "metadata.json").is_file():
        raise InputError("", place, "is not a finished checkpoint: metadata.json is missing")
    reader = TensorReader(folder, iteration, architecture)
    for key, entry in reader.tensors.items():
        if sum(prod(chunk.sizes) for chunk in entry.chunks) != prod(entry.size):
            rule = f"is damaged: the stored parts of {key} do not add up to its shape {tuple(entry.size)}"
            raise InputError("", place, rule)
    return {
        "dtypes": sorted({type_name(reader.dtype(parameter.key)) for parameter in parameter_table(architecture)}),
        "optimizer": any(key.startswith("optimizer.") for key in reader.tensors),
        "stored_bytes": _check_files(place, reader),
    }


def _check_files(place: Path, reader: TensorReader) -> int:
    """Bytes of the files that `.metadata` names, each of which must be long enough for its last part."""
    ends: Counter[str] = Counter()
    for info in reader.metadata.storage_data.values():
        ends[info.relative_path] = max(ends[info.relative_path], info.offset + info.length)
    total = 0
    for name, end in ends.items():
        path = place / name
        if not path.is_file():
            raise InputError("", path, "is missing, though .metadata names it")
        size = path.stat().st_size
        if size < end:
            raise InputError("", path, f"is cut off: it has {size:,} bytes where .metadata needs {end:,}")
        total += size
    return total


def inspect_hugging_face(folder: Path) -> dict[str, Any]:
    """Description of a Hugging Face folder; any one process calls.

    The safetensors files must have exactly the tensors of the family's table, in their shapes. Raises InputError if
    they do not, or if the family is not known.
    """
    try:
        # The files have no padding rows, so none are shown.
        architecture = read_config(folder, make_vocab_size_divisible_by=1)
        wanted = units(architecture)
        files = SafetensorsFolder(folder)
        notes = files.check(wanted, architecture, allow_extra=True)
    except InputError as error:
        raise InputError("path" if error.key == "hf" else error.key, error.value, error.rule, error.remedy) from error
    dtypes = {type_name(files.dtype(name)) for unit in wanted for name in unit.names}
    used = sorted(set(files.places.values()))
    other = sorted({path.name for path in folder.glob("*.safetensors")} - set(used))
    return {
        "path": str(folder),
        "kind": "hugging_face",
        **describe_architecture(architecture),
        "dtypes": sorted(dtypes),
        "files": len(used),
        "stored_bytes": sum((folder / name).stat().st_size for name in used),
        "lineage": _card_lineage(folder / "README.md"),
        "warnings": [*(f"{name} is in no index: it is not read" for name in other), *notes],
    }


def _card_lineage(card: Path) -> dict[str, Any]:
    """The lineage that `export` writes into a model card; empty if there is none."""
    if not card.is_file():
        return {}
    _, mark, rest = card.read_text(encoding="utf-8", errors="replace").partition("```yaml\n")
    try:
        lineage = yaml.safe_load(rest.partition("```")[0]) if mark else None
    except yaml.YAMLError:
        return {}  # somebody else's model card
    return lineage if isinstance(lineage, dict) and "stage" in lineage else {}
