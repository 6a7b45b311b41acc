"""The sections on how it was trained, and what that took: curves, throughput, memory, cost. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from minitron_mcore.report.figures.curves import Line, against_tokens, shares
from minitron_mcore.report.gather.report import Report
from minitron_mcore.report.gather.trainings import RATES, STEP, Curve
from minitron_mcore.report.page.parts import NONE, Drawn, Part, Section, Table, Words, decimals, duration, short, whole
from minitron_mcore.tables import counted

# Name in metrics.jsonl -> (title, axis). Drawn where a training logs it.
CURVES = {
    "lm loss": ("Next-token loss", "LM loss, nats a token"),
    "logits distillation loss": ("Distillation loss", "loss on logits"),
    "top-1 agreement": ("Agreement with the teacher's likeliest token", "share of tokens"),
    "grad-norm": ("Gradient norm", "norm"),
    "learning-rate": ("Learning rate", "rate"),
}
LOGARITHMIC = ("grad-norm",)
ALIGNED = {"align": ("lm loss",)}  # drawn among the rounds of an alignment, as `loss`


def training(report: Report) -> Section | None:
    """Curves of all trainings on one axis of tokens."""
    if not report.trainings:
        return None
    shades = report.shades
    parts: list[Part] = [*map(Words, _cut_off(report))]
    for name, (title, ylabel) in CURVES.items():
        lines = [
            Line(each.label, shades[each.label], curve, each.validation.get(name, ()))
            for each in report.trainings
            if name not in ALIGNED.get(each.section, ())
            and len(curve := [point for point in each.curves.get(name, ()) if point[1] > 0]) > 1
        ]
        if not lines:
            continue
        svg = against_tokens(f"curve-{name.replace(' ', '-')}", title, lines, ylabel, log_y=name in LOGARITHMIC)
        dots = "; dots are validations on held-out text" if any(line.dots for line in lines) else ""
        parts.append(Drawn(svg, f"{title} of each training, over its own tokens{dots}"))
    rows = [
        (
            each.label,
            each.section,
            f"{each.done:,}" + (f" of {each.iterations:,}" if each.is_cut_off else ""),
            whole(each.tokens),
            duration(each.seconds),
            _last(each.curves),
            _last(each.validation),
            whole(each.skipped),
        )
        for each in report.trainings
    ]
    head = ("training", "verb", "iterations", "tokens", "first to last step", "last loss", "last validation", "skipped")
    parts.append(Table("The trainings", head, tuple(rows), (1,)))
    return Section("training", "Training", parts)


def _last(curves: Mapping[str, Curve]) -> str:
    curve = curves.get("loss") or curves.get("lm loss")  # of an alignment, and of any other training
    return decimals(curve[-1][1], 4) if curve else NONE


def _cut_off(report: Report) -> Iterator[str]:
    for each in report.trainings:
        if each.is_cut_off:
            yield f"{each.label} has not ended: {each.done:,} of {each.iterations:,} iterations are logged."


def throughput(report: Report) -> Section | None:
    """How fast the steps were, and where their time went."""
    timed = [each for each in report.trainings if each.rates]
    if not timed:
        return None
    names = [name for name in (STEP, *RATES) if any(name in each.rates for each in timed)]
    rows = tuple((each.label, *(decimals(each.rates.get(name), _digits(name)) for name in names)) for each in timed)
    parts: list[Part] = [Table("Medians over the logged intervals", ("training", *names), rows)]
    bars = {each.label: each.parts for each in timed if each.parts}
    if bars:
        title = "Where the time of a step goes"
        parts.append(Drawn(shares("parts", title, bars), f"{title}, as shares of all ranks' time"))
    return Section("throughput", "Throughput", parts)


def _digits(name: str) -> int:
    return 0 if name == "tokens per second" else 1 if name == STEP else 3


def memory(report: Report) -> Section | None:
    """What was forecast of a rank, and what was measured."""
    forecasts = _forecasts(report)
    rows = [
        (
            each.label,
            decimals(expected / 2**30 if (expected := forecasts.get(each.label)) else None, 3),
            decimals(each.peak_memory, 3),
        )
        for each in report.trainings
        if each.peak_memory is not None or each.label in forecasts
    ]
    if not rows:
        return None
    head = ("training", "forecast", "measured")
    said = "Measured is the most that was allocated on a GPU; on a CPU, the most that the whole process, with its "
    said += "libraries, has taken since it started."
    return Section("memory", "Memory", [Table("Peak memory of a rank, GiB", head, tuple(rows)), Words(said)])


def _forecasts(report: Report) -> dict[str, float]:
    """Label of a training -> bytes, of the run's own forecasts, else of its estimate."""
    estimated = report.estimated.trainings if report.estimated else ()
    titles = {each.title: float(sum(each.memory.values())) for each in estimated}
    if report.road is not None:
        titles |= report.road.forecasts
    return {label: size for each in report.trainings if (size := titles.get(title_of(label := each.label)))}


def title_of(label: str) -> str:
    """The title of the step that made a training's model."""
    if label in ("teacher", "corrected teacher"):
        return "train the teacher" if label == "teacher" else "correct the teacher"
    return f"distil {label.removesuffix(' distilled')}" if label.endswith(" distilled") else label


def cost(report: Report) -> Section | None:
    if report.estimated is None or not report.estimated.trainings:
        return None
    found = report.estimated
    rows = tuple(
        (
            each.title,
            short(each.tokens),
            duration(each.seconds),
            decimals(each.gpu_hours, 2),
            decimals(each.cost, 2),
            decimals(each.kilowatt_hours, 2),
            decimals(sum(each.memory.values()) / 2**30 if each.memory else None, 3),
        )
        for each in found.trainings
    )
    head = ("training", "tokens", "time", "GPU-hours", "cost", "kWh", "GiB a rank")
    where = counted(found.gpus, "CPU rank" if found.on_cpu else "GPU") + (f" ({found.device})" if found.device else "")
    return Section("cost", "Cost", [Table(f"As estimated for {where}, before it ran", head, rows)])
