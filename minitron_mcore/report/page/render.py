"""From what was gathered to the page. Pure."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from minitron_mcore import __version__
from minitron_mcore.report.gather.report import Report
from minitron_mcore.report.page import aligned, came_from, chosen, made, measured, trained
from minitron_mcore.report.page.parts import short

KINDS = {
    "run": "run",
    "search": "search",
    "training": "training",
    "rounds": "rounds of alignment",
    "checkpoint": "checkpoint",
    "part": "part of a run",
}
ORDER = (
    *(made.losses, made.road, made.shapes, chosen.importance, chosen.depth, chosen.cuts, trained.training),
    aligned.alignment,
    *(measured.tasks, measured.written, measured.speed, made.search),
    *(trained.throughput, trained.memory, trained.cost),
)


def render(report: Report) -> str:
    """The page, as HTML that needs no other file. The same files give the same bytes."""
    sections = [found for make in ORDER if (found := make(report)) is not None]
    sections += [found] if (found := came_from.provenance(report)) else []
    sections += [found] if (found := came_from.missing(report, {each.name for each in sections})) else []
    folder = Path(__file__).parent
    templates = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("page.html").render(
        name=report.place.name,
        kind=KINDS[report.place.kind],
        folder=str(report.place.folder),
        facts=_facts(report),
        sections=sections,
        style=(folder / "style.css").read_text(encoding="utf-8"),
        version=__version__,
    )


def _facts(report: Report) -> list[tuple[str, str]]:
    """What a reader wants to know first: (what, how much)."""
    facts = []
    if report.road is not None and report.road.steps:
        whole = f" of {len(report.road.steps)}" if report.road.is_whole else ""
        facts.append(("steps done", f"{report.road.num_done}{whole}"))
    if report.models.teacher is not None:
        facts.append(("teacher's parameters", short(report.models.teacher.num_parameters)))
    for each in report.outcomes:
        if each.label.endswith("distilled") or each.label == "teacher":
            size = each.count("parameters")
            said = f", {short(size)} parameters" if size else ""
            facts.append((f"{each.label}: held-out loss{said}", f"{each.loss:.4f}"))
    return facts
