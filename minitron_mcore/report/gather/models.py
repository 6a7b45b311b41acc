"""The models of a run: their shapes, and where each comes from. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture, load_architecture
from minitron_mcore.errors import InputError
from minitron_mcore.importance.scores import Scores, load_scores
from minitron_mcore.pruning.plan_file import PruningPlan, load_plan
from minitron_mcore.report.gather.place import ARCHITECTURE, PLAN, SCORES, Place, read_mapping_of


@dataclass(frozen=True)
class Shape:
    """A model by its label. Two labels of one shape, as of a student before and after its training, share an entry."""

    labels: tuple[str, ...]
    architecture: Architecture


@dataclass(frozen=True)
class Origin:
    """What lies beside a checkpoint's weights. lineage: {} where nothing says it. verb: what made it, "" if unknown."""

    label: str
    folder: str
    lineage: dict[str, Any]
    parallel: dict[str, Any]

    @property
    def verb(self) -> str:
        return str(self.lineage.get("stage", ""))


@dataclass(frozen=True)
class Models:
    """shapes: the teacher's first, where it is known. plans: student -> what it keeps."""

    teacher: Architecture | None
    shapes: tuple[Shape, ...]
    origins: tuple[Origin, ...]
    plans: dict[str, PruningPlan]
    scores: Scores | None


def find_models(place: Place) -> Models:
    plans = _plans(place)
    scores = _scores(place)
    found: dict[str, Architecture] = {}
    for part in place.holding(ARCHITECTURE):
        try:
            found[place.label(part)] = load_architecture(part / ARCHITECTURE)
        except (InputError, OSError):
            continue
    teacher = found.get("teacher") or (scores.architecture if scores else None)
    if teacher is None and plans:
        teacher = next(iter(plans.values())).teacher
    if teacher is not None:
        found = {"teacher": teacher, **found}
    labels: dict[Architecture, list[str]] = {}
    for label, architecture in found.items():
        labels.setdefault(architecture, []).append(label)
    shapes = tuple(Shape(tuple(names), architecture) for architecture, names in labels.items())
    origins = tuple(_origin(place, part) for part in place.parts if (part / "lineage.yaml").is_file())
    return Models(teacher, shapes, origins, plans, scores)


def _plans(place: Place) -> dict[str, PruningPlan]:
    """The first of each student's copies of its plan; of equal plans the first."""
    found: dict[str, PruningPlan] = {}
    for part in place.holding(PLAN):
        name = place.student(place.label(part))
        try:
            plan = load_plan(part / PLAN)
        except (InputError, OSError):
            continue
        if name not in found and plan.fingerprint not in {each.fingerprint for each in found.values()}:
            found[name] = plan
    return found


def _scores(place: Place) -> Scores | None:
    """Those in the folder, else those that the recipe names."""
    named = place.recipe.scores if place.recipe else None
    for path in (place.folder / SCORES, *place.folder.glob("*.safetensors"), *([Path(named)] if named else [])):
        try:
            return load_scores(path)
        except (InputError, OSError):
            continue
    return None


def _origin(place: Place, part: Path) -> Origin:
    lineage, parallel = read_mapping_of(part / "lineage.yaml"), read_mapping_of(part / "recipe.yaml").get("parallel")
    where = str(part.relative_to(place.folder))
    return Origin(place.label(part), where, lineage, parallel if isinstance(parallel, dict) else {})
