"""The sections on what was chosen: importance, the depth scan, what stays, how close it was. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from minitron_mcore.importance.scores import Scores
from minitron_mcore.pruning.plan_file import SIZES, PruningPlan
from minitron_mcore.report.figures.heat import by_place, by_rank, depth_scan, margins, ranked_line
from minitron_mcore.report.gather.report import Report
from minitron_mcore.report.page.parts import NONE, Drawn, Part, Section, Table, Words

AXES = {
    "hidden": "hidden channels",
    "ffn": "neurons of the FFN",
    "heads": "query heads",
    "groups": "KV groups",
    "layers": "layers",
}
MANY = 64  # heads in a layer; more are shown by rank
STUDENTS = 4  # whose marks a figure has


def importance(report: Report) -> Section | None:
    """Heat maps by axis and layer, with marks on what each student keeps."""
    scores = report.models.scores
    if scores is None:
        return None
    parts: list[Part] = [Words(_how(scores)), *_maps(report, scores)]
    return Section("importance", "Importance, and what was kept", parts)


def _how(scores: Scores) -> str:
    said = scores.settings.get("importance", {})
    method = said.get("method", "activation") if isinstance(said, dict) else "activation"
    how = f"by {method}"
    if method == "activation" and scores.primary:
        batch, sequence, site = scores.primary.split("/")
        how += f" ({sequence} over the sequence, {batch} over the batch, neurons at {site})"
        samples = said.get("num_samples")
        how += f", over {samples} samples of calibration text" if samples else ""
    further = f" {len(scores.variants)} further aggregations are in the scores file." if scores.variants else ""
    return f"The teacher's axes were scored {how}. A larger score is more important.{further}"


def _maps(report: Report, scores: Scores) -> Iterator[Part]:
    plans = dict([*report.models.plans.items()][:STUDENTS])
    shades = report.shades
    hidden = {student: len(plan.hidden) for student, plan in _cutting(plans, "hidden").items()}
    title = "Importance of hidden channels"
    yield Drawn(ranked_line("hidden", title, scores.hidden, "hidden channels", hidden, shades), title)
    arrays = {"ffn": scores.ffn, "heads": scores.heads, "groups": scores.groups}
    for axis, values_LN in arrays.items():
        if values_LN is None or values_LN.shape[1] == 1:
            continue
        cutting, what = _cutting(plans, axis), AXES[axis]
        title = f"Importance of {what}"
        if axis == "ffn" or values_LN.shape[1] > MANY:
            cuts = {name: (getattr(plan.student, SIZES[axis]), plan.layers) for name, plan in cutting.items()}
            svg = by_rank(axis, title, values_LN, what, cuts, shades)
            yield Drawn(svg, f"{title}, by layer: a row that turns dark early can do without many of them")
        else:
            kept = {name: getattr(plan, axis) for name, plan in cutting.items()}
            yield Drawn(by_place(axis, title, values_LN, what, kept, shades), f"{title}, by layer")


def _cutting(plans: Mapping[str, PruningPlan], axis: str) -> dict[str, PruningPlan]:
    """The plans that leave out something of an axis."""
    size = SIZES[axis]
    return {name: plan for name, plan in plans.items() if getattr(plan.student, size) < getattr(plan.teacher, size)}


def depth(report: Report) -> Section | None:
    """What leaving out layers and blocks costs, and which layers stay."""
    scores = report.models.scores
    if scores is None:
        return None
    layers, shades = len(scores.layers), report.shades
    kept = {name: plan.layers for name, plan in _cutting(report.models.plans, "layers").items()}
    kept = dict([*kept.items()][:STUDENTS])
    lengths: dict[int, dict[str, list[float]]] = {1: {"block_influence": scores.layers.tolist()}}
    for name, values in scores.depth.items():
        metric, _, said = name.rpartition("@")
        influence = {"block_influence": scores.depth_of("block_influence", int(said)).tolist()}
        lengths.setdefault(int(said), influence)[metric] = values.tolist()
    shown = {1} | {plan.teacher.num_layers - plan.student.num_layers for plan in report.models.plans.values()}
    parts: list[Part] = []
    for length in sorted(lengths.keys() & shown):
        title = "What leaving out a layer costs" if length == 1 else f"What leaving out {length} layers costs"
        marks = kept if length == 1 else {}
        svg = depth_scan(f"depth-{length}", title, lengths[length], layers, length, marks, shades)
        parts.append(Drawn(svg, f"{title}, by each measure"))
    if len(lengths) > 1:
        parts.append(_cheapest(lengths))
    return Section("depth", "Depth scan", parts)


def _cheapest(lengths: Mapping[int, Mapping[str, Sequence[float]]]) -> Table:
    """Of each length and measure, the block that costs least."""
    measures = [*dict.fromkeys(name for costs in lengths.values() for name in costs)]
    rows = [
        (str(length), *(_least(costs.get(name, ()), length) for name in measures))
        for length, costs in sorted(lengths.items())
    ]
    head = ("layers left out", *(name.replace("_", " ") for name in measures))
    return Table("Which block costs least to leave out, and how much", head, tuple(rows), is_folded=len(rows) > 8)


def _least(costs: Sequence[float], length: int) -> str:
    if not costs:
        return NONE
    first = min(range(len(costs)), key=costs.__getitem__)
    return f"{first}{f'–{first + length - 1}' if length > 1 else ''}: {costs[first]:.4g}"


def cuts(report: Report) -> Section | None:
    """How close the decisions were."""
    rows, gaps, tolerance = [], {}, 0.0
    for student, plan in report.models.plans.items():
        tolerance = max(tolerance, float(plan.settings.get("tolerance") or 0.0))
        for axis, cut in plan.cuts.items():
            if cut.margin is None:
                continue
            where = "" if cut.layer is None else f"layer {cut.layer}"
            where += "" if cut.group is None else f", group {cut.group}"
            scores = (f"{cut.lowest_kept:.5g}", f"{cut.highest_dropped:.5g}", f"{100 * cut.margin:.2g}%")
            rows.append((f"{student}: {AXES.get(axis, axis)}", f"{cut.kept:,} of {cut.of:,}", where, *scores))
            decided = plan.decided.get(axis) or [[cut.lowest_kept or 0.0, cut.highest_dropped or 0.0]]
            gaps[f"{student}: {axis}"] = [_margin(*pair) for pair in decided if len(pair) == 2]
    if not rows:
        return None
    head = ("student: axis", "kept", "narrowest cut", "last kept", "first dropped", "margin")
    caption = "The narrowest cut of each axis: the scores on both sides of it, and the gap as a share of the larger"
    parts: list[Part] = [Table(caption, head, tuple(rows), (2,))]
    title = "Margins of all cuts"
    parts.append(Drawn(margins("margins", title, gaps, tolerance or 1e-5), f"{title}, one mark each"))
    warnings = [f"{student}: {each}." for student, plan in report.models.plans.items() for each in plan.warnings]
    return Section("margins", "How close the cuts were", [*parts, *map(Words, warnings)])


def _margin(kept: float, dropped: float) -> float:
    scale = max(abs(kept), abs(dropped))
    return (kept - dropped) / scale if scale else 0.0
