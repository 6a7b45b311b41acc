"""The sections on what was made: the road, the shapes, the losses before and after, the search. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from minitron_mcore.architecture import Architecture
from minitron_mcore.report.figures.curves import Line, against_tokens, costs, loss_by_size
from minitron_mcore.report.gather.report import Report
from minitron_mcore.report.page.parts import Drawn, Part, Section, Table, Words, decimals, duration, short, whole

# Field of an architecture -> its column.
SIZES = {
    "num_layers": "layers",
    "hidden_size": "hidden",
    "ffn_hidden_size": "FFN",
    "num_attention_heads": "heads",
    "num_query_groups": "groups",
}
DRAWN = 12  # candidates of a search in a figure
LISTED = 40  # candidates of a search; more are in its files


def losses(report: Report) -> Section | None:
    """The table that a run ends with, each model beside the first."""
    if not report.outcomes:
        return None
    first, *_ = report.outcomes
    rows = []
    for each in report.outcomes:
        parameters, teachers = each.count("parameters"), first.count("parameters")
        share = f"{parameters / teachers:.0%}" if parameters and teachers else ""
        difference = "" if each is first else f"{each.loss - first.loss:+.4f}"
        counts = (short(parameters), share, whole(each.count("tokens")))
        rows.append((each.label, f"{each.loss:.4f}", difference, decimals(each.count("ppl"), 2), *counts))
    samples, length = first.count("samples"), first.count("sequence_length")
    said = f" over {samples:,.0f} sequences of {length:,.0f} tokens" if samples and length else ""
    head = ("model", "LM loss", f"to {first.label}", "perplexity", "parameters", "of its size", "trained tokens")
    parts: list[Part] = [Table(f"Held-out loss in nats a token{said}", head, tuple(rows))]
    shades = report.shades
    dots = {
        each.label: (size, each.loss, shades[each.label])
        for each in report.outcomes
        if (size := each.count("parameters")) is not None
    }
    if len(dots) > 1:
        title = "Held-out loss against parameters"
        parts.append(Drawn(loss_by_size("loss-by-size", title, dots), f"{title}. Lower left is better."))
    return Section("losses", "Before and after", parts)


def road(report: Report) -> Section | None:
    if report.road is None or not report.road.steps:
        return None
    told = report.road
    rows = tuple((step.title, "done" if step.is_done else "not yet", duration(step.seconds)) for step in told.steps)
    count = f"{told.num_done} of {len(told.steps)} steps are done"
    if not told.is_whole:
        count = f"{told.num_done} steps are done; which are left cannot be said from here"
    known = [step.seconds for step in told.steps if step.seconds is not None]
    said = f" They took {duration(sum(known))} together." if len(known) == len(told.steps) else ""
    parts: list[Part] = [Words(f"{count}.{said}")]
    parts.append(Table("The steps, in order", ("step", "", "time"), rows, (1,), len(rows) > 25))
    return Section("road", "The road walked", parts)


def shapes(report: Report) -> Section | None:
    """The teacher's shape, and those that were cut from it."""
    models = report.models
    if not models.shapes:
        return None
    base = models.teacher or models.shapes[0].architecture
    rows = []
    for shape in models.shapes:
        names = dict.fromkeys(map(report.place.student, shape.labels))
        rows.append((", ".join(names), *_shape_cells(shape.architecture, base)))
    head = ("model", *SIZES.values(), "head size", "parameters", "without embeddings", "FLOPs a token")
    caption = "A student is of one shape before and after its training; shares are of the first row"
    return Section("shapes", "Shapes before and after", [Table(caption, head, tuple(rows))])


def _shape_cells(shape: Architecture, base: Architecture) -> Iterator[str]:
    for name in SIZES:
        yield f"{getattr(shape, name):,}"
    yield f"{shape.kv_channels:,}"
    length = base.max_position_embeddings
    for value, whole_ in (
        (shape.num_parameters, base.num_parameters),
        (shape.num_non_embedding_parameters, base.num_non_embedding_parameters),
        (shape.forward_flops_per_token(length), base.forward_flops_per_token(length)),
    ):
        yield short(value) + ("" if shape == base else f" ({value / whole_:.0%})")


def search(report: Report) -> Section | None:
    if report.search is None:
        return None
    found = report.search
    tried = [each for each in found.candidates if each.rank is not None]
    parts: list[Part] = [Words(_search_words(report))]
    dots = [
        (each.name, size, each.loss, each.on_front)
        for each in tried
        if each.loss is not None and (size := each.count("total_parameters")) is not None
    ]
    if dots:
        title = "What the candidates' losses cost"
        parts.append(Drawn(costs("search-costs", title, dots, "parameters"), f"{title}. Lower left is better."))
    shown = [each for each in tried if each.curve][:DRAWN]
    lines = [Line(each.name, place, each.validation or each.curve, each.curve) for place, each in enumerate(shown)]
    if lines:
        title = "Held-out loss of the best candidates"
        said = f"{title}; dots are where they were compared, lines their own validations"
        parts.append(Drawn(against_tokens("search-curves", title, lines, "held-out LM loss, nats a token"), said))
    head = ("candidate", "rank", "before", *SIZES.values(), "parameters", "untrained loss", "loss", "tokens", "front")
    rows = [
        (
            each.name,
            str(each.rank or "–"),
            whole(each.count("zero_shot_rank")),
            *(whole(each.count(name)) for name in SIZES),
            short(each.count("total_parameters")),
            decimals(each.before, 4),
            decimals(each.loss, 4),
            whole(each.count("tokens")),
            "yes" if each.on_front else "",
        )
        for each in found.candidates[:LISTED]
    ]
    caption = "Candidates, the best first"
    if (left := len(found.candidates) - len(rows)) > 0:
        caption += f"; {left:,} more are in candidates.csv"
    parts.append(Table(caption, head, tuple(rows), is_folded=len(rows) > 12))
    return Section("search", "Search", parts)


def _search_words(report: Report) -> str:
    assert report.search is not None
    found = report.search
    tried = sum(each.rank is not None for each in found.candidates)
    said = f"{len(found.candidates):,} candidates fit the budgets"
    limits = {name: value for name, value in found.budgets.items() if name != "tolerance"}
    if limits:
        said += f" ({', '.join(f'{name} {_limit(value)}' for name, value in limits.items())})"
    said += f"; {tried:,} were tried." if tried else "; none was tried yet."
    if found.correlation is not None:
        said += f" Spearman correlation of the ranks before and after training: {found.correlation:.2f}."
    return said


def _limit(value: object) -> str:
    bounds = value if isinstance(value, list) else [value]
    return " to ".join(short(each) if isinstance(each, int | float) else "any" for each in bounds)
