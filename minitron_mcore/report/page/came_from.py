"""The sections on where it comes from, and on what is not there. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import yaml

from minitron_mcore.report.gather.outcomes import exported
from minitron_mcore.report.gather.place import read_mapping_of
from minitron_mcore.report.gather.report import Report
from minitron_mcore.report.gather.road import Start
from minitron_mcore.report.gather.trainings import SECTIONS
from minitron_mcore.report.page.parts import NONE, Listing, Part, Section, Table, Words


def provenance(report: Report) -> Section | None:
    """Commands, versions, lineage, the recipe."""
    parts: list[Part] = []
    starts = report.road.starts if report.road else ()
    if starts:
        rows = [(_moment(each.time), each.command, f"{each.ranks:,}", each.device) for each in starts]
        head = ("started", "command", "ranks", "device")
        parts += [Table("Commands that worked on this run", head, tuple(rows), (1, 3)), _versions(starts)]
    again = [
        (each.label, _command(report, each.verb, each.folder, each.parallel))
        for each in report.models.origins
        if each.verb in SECTIONS
    ]
    if report.place.kind == "run":
        parallel = read_mapping_of(report.place.folder / "recipe.yaml").get("parallel")
        again.insert(0, ("the whole run", _command(report, "run", ".", parallel if isinstance(parallel, dict) else {})))
    if again:
        caption = "The same again, on as few ranks as hold the model: each recipe is stored with what it made"
        parts.append(Table(caption, ("what", "command"), tuple(again), (1,), is_folded=True))
    for origin in report.models.origins:
        if origin.lineage:
            text = yaml.safe_dump(origin.lineage, sort_keys=False, allow_unicode=True)
            parts.append(Listing(f"Lineage of {origin.label}", text.strip()))
    if folders := exported(report.place):
        names_ = ", ".join(str(path.relative_to(report.place.folder)) for path in folders)
        parts.append(Words(f"Exported for Hugging Face transformers: {names_}."))
    recipe = report.place.folder / "recipe.yaml"
    if recipe.is_file():
        parts.append(Listing("The recipe, resolved", recipe.read_text(encoding="utf-8", errors="replace").strip()))
    return Section("provenance", "Commands, versions, lineage", parts) if parts else None


def _versions(starts: Sequence[Start]) -> Table:
    """A column for each set of versions that a command ran with."""
    names = dict.fromkeys(name for each in starts for name in each.versions)
    sets = [*dict.fromkeys(tuple(each.versions.get(name, NONE) for name in names) for each in starts)]
    rows = tuple((name, *(row[place] for row in sets)) for place, name in enumerate(names))
    head = ("package", *(["version"] if len(sets) == 1 else [f"version {place}" for place in range(1, len(sets) + 1)]))
    return Table("Versions", head, rows, tuple(range(1, len(head))))


def _command(report: Report, verb: str, folder: str, parallel: Mapping[str, Any]) -> str:
    sizes = [parallel.get(name) for name in ("tensor", "pipeline", "context")]
    ranks = math.prod(size for size in sizes if isinstance(size, int))
    start = "minitron" if ranks == 1 else f"torchrun --nproc-per-node {ranks} -m minitron_mcore"
    return f"{start} {verb} --config {report.place.folder / folder / 'recipe.yaml'}"


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def missing(report: Report, there: set[str]) -> Section | None:
    """What a page can show and this one does not, and which verb would make it."""
    ways = {
        "losses": ("held-out losses", "minitron evaluate"),
        "importance": ("importance and the depth scan", "minitron score"),
        "margins": ("a pruning plan, with its margins", "minitron plan, or prune"),
        "training": ("a training's metrics", "minitron train, correct, distill or align"),
        "alignment": ("the rounds of an alignment", "minitron align"),
        "search": ("a search's candidates", "minitron search"),
        "tasks": ("scores on tasks", "minitron evaluate"),
        "written": ("continuations of prompts", "minitron generate, with generate.output"),
        "speed": ("speed of generation", "minitron bench"),
        "cost": ("cost", "minitron estimate"),
    }
    rows = tuple(way for name, way in ways.items() if name not in there)
    if not rows:
        return None
    table = Table("Shown here once it lies in this folder", ("what", "made by"), rows, (1,))
    return Section("missing", "What is not here", [table])
