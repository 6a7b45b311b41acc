"""Figures whose rows are things by name: scores on tasks, speed-ups. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minitron_mcore.report.figures.svg import FAINT, color, drawing, inline

DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)))
# Row -> model -> (value, its error or None).
Dots = Mapping[str, Mapping[str, tuple[float, float | None]]]


def dots(
    name: str,
    title: str,
    rows: Dots,
    xlabel: str,
    shades: Mapping[str, int],
    *,
    digits: int,
    lines: Mapping[str, float] | None = None,
) -> str:
    """A row of dots for each thing, a dot for each model, with its standard error where it has one. lines: values that
    stand across all rows, by name."""
    models = [*dict.fromkeys(model for row in rows.values() for model in row)]
    with drawing(1.2 + 0.3 * len(rows) + 0.16 * ((len(models) + len(lines or {}) + 1) // 2)) as figure:
        panel = figure.subplots()
        marks = "osD^vPX*"
        for place, model in enumerate(models):
            shift = 0.36 * (place / max(len(models) - 1, 1) - 0.5)
            at = [
                (row[model][0], y + shift, row[model][1] or 0.0) for y, row in enumerate(rows.values()) if model in row
            ]
            values, heights, errors = zip(*at, strict=True)
            style: dict[str, Any] = {"color": color(shades.get(model, place)), "ms": 5, "elinewidth": 1.1}
            panel.errorbar(values, heights, xerr=errors, fmt=marks[place % len(marks)], label=model, **style)
        for place, (label, value) in enumerate((lines or {}).items()):
            panel.axvline(value, color=FAINT, lw=1.2, ls=DASHES[place % len(DASHES)], label=label)
        panel.set_yticks(range(len(rows)), [*rows])
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.tick_params(axis="y", length=0)
        panel.set_xlabel(xlabel)
        panel.margins(x=0.06)
        panel.grid(axis="x", lw=0.6)
        figure.legend(loc="outside lower left", ncols=2, handlelength=1.4, columnspacing=1.2)
        told = "; ".join(_in_words(row, of_row, digits) for row, of_row in rows.items())
        across = "".join(f" {label}: {value:.{digits}f}." for label, value in (lines or {}).items())
        return inline(name, figure, title, f"{title}. {told}.{across}")


def _in_words(row: str, of_row: Mapping[str, tuple[float, float | None]], digits: int) -> str:
    each: Sequence[str] = [f"{model} {value:.{digits}f}" for model, (value, _) in of_row.items()]
    return f"{row.replace(chr(10), ', ')}: {', '.join(each)}"
