"""Losses and other curves against tokens; losses against sizes. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minitron_mcore.report.figures.svg import color, count_axis, count_words, drawing, inline

# By colour: where lines lie on each other, the lower one shows through.
DASHES: tuple[Any, ...] = ("-", "-", (0, (5, 1.4)), (0, (2.4, 1.2)), (0, (6, 1.2, 1.2, 1.2)), (0, (1, 1)))
POINTS = 160  # of a line; more would not be seen
LEAST = 0.005  # of a bar; less would not be seen
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """place: of its colour and its dashes; the same in every figure of a page. dots: measured at these points alone.
    is_dashed: the second of two lines of a colour, of which the first is whole, and its dots are hollow; None: as the
    colour has it."""

    label: str
    place: int
    points: Points
    dots: Points = ()
    is_dashed: bool | None = None

    @property
    def dashes(self) -> Any:
        return DASHES[self.place % len(DASHES)] if self.is_dashed is None else DASHES[2 * self.is_dashed]


def thinned(points: Points) -> Points:
    """At most POINTS points: the means of stretches of equal length on a logarithmic axis, where the beginning is as
    wide as the end."""
    positive = [point for point in points if point[0] > 0]
    if len(positive) <= POINTS:
        return positive
    first, last = math.log(positive[0][0]), math.log(positive[-1][0])
    stretches: dict[int, list[tuple[float, float]]] = {}
    for tokens, value in positive:
        stretches.setdefault(int(POINTS * (math.log(tokens) - first) / (last - first)), []).append((tokens, value))
    return [
        (sum(tokens for tokens, _ in each) / len(each), sum(value for _, value in each) / len(each))
        for each in stretches.values()
    ]


def against_tokens(name: str, title: str, lines: Sequence[Line], ylabel: str, *, log_y: bool = False) -> str:
    """A line for each training, dots for its validations, over tokens on a logarithmic axis."""
    with drawing(3.3 + 0.16 * math.ceil(len(lines) / 2)) as figure:
        panel = figure.subplots()
        for line in lines:
            points = thinned(line.points)
            if points:
                panel.plot(
                    *zip(*points, strict=True), color=color(line.place), ls=line.dashes, lw=1.3, label=line.label
                )
            if line.dots:
                label = None if points else line.label
                style: dict[str, Any] = {"fillstyle": "none" if line.is_dashed else "full", "ms": 3.5, "label": label}
                panel.plot(*zip(*line.dots, strict=True), "o", color=color(line.place), **style)
        panel.set_xscale("log")
        if log_y:
            panel.set_yscale("log")
            count_axis(panel, "y")
        count_axis(panel, "x")
        panel.set_xlabel("tokens trained on")
        panel.set_ylabel(ylabel)
        panel.grid(lw=0.6)
        figure.legend(loc="outside lower left", ncols=2, handlelength=1.6, columnspacing=1.2)
        return inline(name, figure, title, f"{title}, over tokens. " + " ".join(map(_in_words, lines)))


def _in_words(line: Line) -> str:
    said = []
    if points := [*line.points]:
        (start, first), (end, last) = points[0], points[-1]
        begun = f"from {first:.4g} at {count_words(start)} to " if len(points) > 1 else ""
        said.append(f"{begun}{last:.4g} at {count_words(end)} tokens")
    if dots := [*line.dots]:
        said.append(f"{dots[-1][1]:.4g} in the last validation, at {count_words(dots[-1][0])} tokens")
    return f"{line.label}: {'; '.join(said)}."


def loss_by_size(name: str, title: str, models: Mapping[str, tuple[float, float, int]]) -> str:
    """A dot for each model. models: label -> (parameters, held-out loss, colour)."""
    with drawing(3.3 + 0.16 * math.ceil(len(models) / 2)) as figure:
        panel = figure.subplots()
        marks = "osD^vPX*"
        for place, (label, (parameters, loss, shade)) in enumerate(models.items()):
            mark = marks[place % len(marks)]
            panel.plot([parameters], [loss], mark, color=color(shade), ms=6.5, label=label)
        panel.margins(0.12)
        count_axis(panel, "x")
        panel.set_xlabel("parameters")
        panel.set_ylabel("held-out LM loss, nats a token")
        panel.grid(lw=0.6)
        figure.legend(loc="outside lower left", ncols=2, handlelength=1.2, columnspacing=1.2)
        told = (f"{label}: {count_words(size)} parameters, {loss:.4f}" for label, (size, loss, _) in models.items())
        return inline(name, figure, title, f"{title}. {'; '.join(told)}.")


def costs(name: str, title: str, dots: Sequence[tuple[str, float, float, bool]], xlabel: str) -> str:
    """Losses of a search's candidates against what they cost. dots: (name, cost, loss, whether it is on the front)."""
    with drawing(3.4) as figure:
        panel = figure.subplots()
        front = sorted((cost, loss, each) for each, cost, loss, on_front in dots if on_front)
        others = [(cost, loss) for _, cost, loss, on_front in dots if not on_front]
        if others:
            panel.plot(
                *zip(*others, strict=True), "o", color=color(0), ms=5, fillstyle="none", label="other candidates"
            )
        if front:
            costs_, losses, _ = zip(*front, strict=True)
            panel.plot(costs_, losses, "o-", color=color(1), ms=5.5, lw=1.2, label="Pareto front")
        panel.margins(0.12)
        count_axis(panel, "x")
        panel.set_xlabel(xlabel)
        panel.set_ylabel("held-out LM loss, nats a token")
        panel.grid(lw=0.6)
        figure.legend(loc="outside lower left", ncols=2)
        told = "; ".join(f"{each}: {count_words(cost)}, {loss:.4f}" for cost, loss, each in front)
        return inline(name, figure, title, f"{title}: {len(dots)} candidates. On the front: {told or 'none'}.")


def shares(name: str, title: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """Where the time of a step goes: a bar for each training, a stretch for each part. rows: label -> part -> share."""
    parts = [*dict.fromkeys(part for row in rows.values() for part, share in row.items() if share >= LEAST)]
    with drawing(1.1 + 0.34 * len(rows) + 0.16 * math.ceil(len(parts) / 2)) as figure:
        panel = figure.subplots()
        left = [0.0] * len(rows)
        for place, part in enumerate(parts):
            widths = [100 * row.get(part, 0.0) for row in rows.values()]
            panel.barh(range(len(rows)), widths, left=left, height=0.62, color=color(place), label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        panel.set_yticks(range(len(rows)), [*rows])
        panel.invert_yaxis()
        panel.set_xlim(0, 100)
        panel.set_xlabel("share of a step's time, %")
        panel.spines["left"].set_visible(False)
        panel.tick_params(axis="y", length=0)
        figure.legend(loc="outside lower left", ncols=3, handlelength=1, columnspacing=1.2)
        told = (
            f"{label}: {', '.join(f'{part} {share:.1%}' for part, share in row.items())}" for label, row in rows.items()
        )
        return inline(name, figure, title, f"{title}. {'; '.join(told)}.")
