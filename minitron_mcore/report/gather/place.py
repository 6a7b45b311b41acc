"""What a folder is, and the parts of a run that lie in it. Pure.

Whatever is missing, cut off or damaged is left out: a page shows what is there.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_mcore.checkpoint.folder import is_hugging_face, is_iteration
from minitron_mcore.errors import InputError
from minitron_mcore.files import read_mapping
from minitron_mcore.keys import NO_KEY
from minitron_mcore.recipe import Recipe, recipe_of

METRICS, ARCHITECTURE, PLAN, SCORES = "metrics.jsonl", "architecture.yaml", "plan.json", "scores.safetensors"
CANDIDATES, RESULTS, BENCH, ESTIMATE = "candidates.json", "results.json", "bench.json", "estimate.json"
KNOWN = (METRICS, ARCHITECTURE, PLAN, SCORES, CANDIDATES, RESULTS, BENCH, ESTIMATE)
UNKNOWN = 30  # keys of a recipe, of another version, that are passed over
DEPTH = 4  # of a run's innermost parts, as search/winner/distilled
# Where no part of a run lies, or (candidates) so many that the list of them says more.
SKIPPED = ("iter_", ".", "tensorboard", "wandb", "data", "hf", "tokenizer", "done", "candidates", "hugging_face")
ROOMS = ("pruned", "distilled", "corrected", "winner", "next_token", "random", "evaluation")
ONE_OF = "name the folder of a run, of a search, of a training or of a checkpoint"


@dataclass(frozen=True)
class Place:
    """A folder that something can be said of. kind: "run", "search", "training", "rounds", "checkpoint" or "part".

    parts: it, and the folders in it that hold files of KNOWN, in the road's order. recipe: what made it; None where
    that cannot be read.
    """

    folder: Path
    kind: str
    parts: tuple[Path, ...]
    recipe: Recipe | None

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def students(self) -> list[str]:
        """In the road's order."""
        there = [part.relative_to(self.folder).parts for part in self.parts]
        return [*dict.fromkeys(names[1] for names in there if len(names) > 1 and names[0] == "students")]

    def student(self, label: str) -> str:
        """The student that a model's label is of, itself and what it is compared with; else the label."""
        names = label.removesuffix(" pruned").removesuffix(" distilled")
        return next((name for name in (*self.students, "winner") if names.startswith(f"{name} ")), names)

    def label(self, part: Path) -> str:
        """What a part is called on the page."""
        names = part.relative_to(self.folder).parts
        match names:
            case ():
                return self.name
            case ("corrected",):
                return "corrected teacher"
            case ("students", name, *rest):
                return " ".join([name, *rest])
            case ("search", "winner", *rest):
                return " ".join(["winner", *rest])
            case ("baselines", kind):
                first = (self.students or ["winner"])[0]
                return f"{first} {'next-token loss' if kind == 'next_token' else 'random weights'}"
        return " ".join(names)

    def holding(self, name: str) -> Iterator[Path]:
        """The parts that hold the file `name`."""
        yield from (part for part in self.parts if (part / name).is_file())


def find_place(path: Path) -> Place:
    """Raises InputError where `path` is neither a run nor a part of one."""
    if not path.exists():
        raise InputError("path", path, "is not there", ONE_OF)
    if not path.is_dir():
        raise InputError("path", path, "is a file", ONE_OF)
    if is_iteration(path) and (path.parent / ARCHITECTURE).is_file():
        path = path.parent
    recipe = read_recipe(path)
    named = [*recipe.run.students] if recipe else []
    found = {part: rounds_before(part) for part in _parts(path)}
    parts = tuple(sorted(found, key=lambda part: _order(part.relative_to(path).parts, named, found[part] or 0)))
    has_rounds = any(part.parent == path and rounds is not None for part, rounds in found.items())
    is_run = (path / "recipe.yaml").is_file() and (path / "done").is_dir()
    if not is_run and not has_rounds and not any(_is_near(part.relative_to(path).parts) for part in parts):
        what = "is a Hugging Face folder" if is_hugging_face(path) else "is neither a run nor a part of one"
        raise InputError("path", path, what, ONE_OF)
    kind = "run" if is_run else _kind(path)
    return Place(path, "rounds" if kind == "part" and has_rounds else kind, parts, recipe)


def rounds_before(part: Path) -> int | None:
    """Of a round of an alignment, how many its model went through before it; None of anything else."""
    lineage: Any = read_mapping_of(part / "lineage.yaml")
    stages = []
    while isinstance(lineage, dict) and lineage.get("stage") == "align":
        stages.append(lineage)
        lineage = lineage.get("lineage")
    return len(stages) - 1 if stages else None


def _kind(folder: Path) -> str:
    if (folder / CANDIDATES).is_file() or (folder / "candidates").is_dir():
        return "search"
    if (folder / METRICS).is_file():
        return "training"
    return "checkpoint" if (folder / ARCHITECTURE).is_file() else "part"


def _is_near(names: tuple[str, ...]) -> bool:
    """Whether a part so far below a folder makes it a part of a run too, as students/NAME and students/ are: not any
    folder that somewhere holds one is."""
    last = names[-1] if names else ""
    return not names or (len(names) < 3 and (last in ROOMS or last.startswith("step-")))


def _parts(folder: Path) -> Iterator[Path]:
    for place, inner, files in os.walk(folder):
        here = Path(place)
        if {*files} & {*KNOWN}:
            yield here
        depth = len(here.relative_to(folder).parts)
        # The last are of the harness, in its own form.
        inner[:] = [
            name for name in inner if depth < DEPTH and not name.startswith(SKIPPED) and name[-8:] != "_lm_eval"
        ]


def _order(names: tuple[str, ...], students: list[str], rounds: int) -> tuple[Any, ...]:
    """The teacher first, then its students in the recipe's order, each before and after its distillation, then what
    they are compared with; the rounds of an alignment one after another."""
    rooms = ("teacher", "corrected", "search", "students", "baselines")
    first = rooms.index(names[0]) if names and names[0] in rooms else -1 if not names else len(rooms)
    student = students.index(names[1]) if len(names) > 1 and names[1] in students else len(students)
    last = {"pruned": 1, "distilled": 2, "corrected": 3}.get(names[-1], 0) if names else 0
    return first, student, names[:-1], last, rounds, names


def read_recipe(folder: Path) -> Recipe | None:
    """The resolved recipe beside the files of `folder`, without keys that another version had; None where there is none
    that can be read."""
    tree = read_mapping_of(folder / "recipe.yaml")
    for _ in range(UNKNOWN if tree else 0):
        try:
            return recipe_of(copy.deepcopy(tree))
        except InputError as error:
            if error.rule != NO_KEY or not _dropped(tree, error.key):
                return None
    return None


def _dropped(tree: dict[str, Any], key: str) -> bool:
    """Whether the key was there to be taken away."""
    section, _, rest = key.partition(".")
    if not rest:
        return tree.pop(section, tree) is not tree
    inner = tree.get(section)
    return isinstance(inner, dict) and _dropped(inner, rest)


def read_mapping_of(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; {} where it is missing or damaged."""
    try:
        return read_mapping(path)
    except InputError:
        return {}


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where it is missing, or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The mappings in a file of JSON lines; a line that a killed process left half-written is left out."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found
