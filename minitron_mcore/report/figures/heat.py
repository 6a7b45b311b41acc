"""Importance as heat maps, with marks on what stays; the depth scan; the margins. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from minitron_mcore.report.figures.svg import FAINT, INK, color, count_axis, drawing, inline

WIDEST = 512  # cells in a row; more are averaged
LAYERS_LABELLED = 16


def by_place(
    name: str,
    title: str,
    scores_LN: numpy.ndarray,
    what: str,
    kept: Mapping[str, Mapping[int, Sequence[int]]],
    shades: Mapping[str, int],
) -> str:
    """Scores of each layer's heads or groups, in their places; a dot for each that a student keeps.

    kept: student -> layer -> indices; layer numbers are the teacher's. shades: student -> its colour.
    """
    layers, count = scores_LN.shape
    with drawing(1.0 + max(1.5, 0.17 * min(layers, 40)) + 0.16 * len(kept)) as figure:
        panel = figure.subplots()
        _image(figure, panel, _share_of_row(scores_LN), "share of largest")
        # One above the other in a cell, and no larger than it.
        size = min(5.0, 130 / count, 9.0 / max(len(kept), 1))
        for place, (student, by_layer) in enumerate(kept.items()):
            shift = 0.8 * ((place + 0.5) / len(kept) - 0.5)
            dots = [(index, layer + shift) for layer, indices in by_layer.items() for index in indices]
            style: dict[str, Any] = {"mfc": color(shades[student]), "mec": "white", "mew": 0.16 * size, "ms": size}
            panel.plot(*zip(*dots, strict=True), "osD^"[place % 4], ls="none", label=f"kept by {student}", **style)
        _layer_axis(panel, layers)
        _whole_numbers(panel.xaxis, count)
        panel.set_xlabel(what)
        if kept:
            figure.legend(loc="outside lower left", ncols=2)
        return inline(name, figure, title, _told(title, scores_LN, what))


def by_rank(
    name: str,
    title: str,
    scores_LN: numpy.ndarray,
    what: str,
    cuts: Mapping[str, tuple[int, Sequence[int]]],
    shades: Mapping[str, int],
) -> str:
    """Scores of each layer's many channels or neurons, the largest first; a line where a student cuts.

    cuts: student -> (how many it keeps, in which layers).
    """
    layers, count = scores_LN.shape
    ordered = -numpy.sort(-scores_LN, axis=1)
    with drawing(1.0 + max(1.5, 0.17 * min(layers, 40)) + 0.16 * math.ceil(len(cuts) / 2)) as figure:
        panel = figure.subplots()
        extent = (0, count, layers - 0.5, -0.5)
        _image(figure, panel, _averaged(_share_of_row(ordered)), "share of largest", extent=extent, gamma=0.5)
        for student, (keep, kept_layers) in cuts.items():
            label = f"{student} keeps {keep:,} of {count:,}"
            for layer in kept_layers:
                style: dict[str, Any] = {"color": "white", "lw": 3.2, "solid_capstyle": "butt"}
                panel.plot([keep, keep], [layer - 0.5, layer + 0.5], **style)
                panel.plot([keep, keep], [layer - 0.5, layer + 0.5], color=color(shades[student]), lw=1.8, label=label)
                label = ""
        _layer_axis(panel, layers)
        panel.set_xlim(0, count)
        panel.set_xlabel(f"{what}, each layer's largest score first")
        if cuts:
            figure.legend(loc="outside lower left", ncols=1 if len(cuts) < 3 else 2)
        return inline(name, figure, title, _told(title, scores_LN, what))


def ranked_line(
    name: str, title: str, scores: numpy.ndarray, what: str, cuts: Mapping[str, int], shades: Mapping[str, int]
) -> str:
    """Scores of an axis that the network has once, the largest first; a line where a student cuts."""
    ordered = -numpy.sort(-scores)
    step = max(1, len(ordered) // WIDEST)
    with drawing(2.9 + 0.16 * math.ceil(len(cuts) / 2)) as figure:
        panel = figure.subplots()
        panel.plot(range(1, len(ordered) + 1)[::step], ordered[::step], color=INK, lw=1.4)
        for student, keep in cuts.items():
            label = f"{student} keeps {keep:,} of {len(ordered):,}"
            panel.axvline(keep + 0.5, color=color(shades[student]), lw=1.6, label=label)
        if ordered[-1] > 0 and ordered[0] > 30 * ordered[-1]:
            panel.set_yscale("log")
            count_axis(panel, "y")
        else:
            panel.set_ylim(min(0.0, ordered[-1]), None)
        panel.set_xlabel(f"{what}, the largest score first")
        panel.set_ylabel("score")
        panel.grid(lw=0.6)
        if cuts:
            figure.legend(loc="outside lower left", ncols=1 if len(cuts) < 3 else 2)
        kept = "".join(f" {student} keeps {keep:,}." for student, keep in cuts.items())
        spread = f"from {ordered[0]:.4g} down to {ordered[-1]:.4g}"
        return inline(name, figure, title, f"{title}: {len(ordered):,} scores, {spread}.{kept}")


def depth_scan(
    name: str,
    title: str,
    costs: Mapping[str, Sequence[float]],
    layers: int,
    length: int,
    kept: Mapping[str, list[int]],
    shades: Mapping[str, int],
) -> str:
    """What leaving out each layer, or each block of `length` layers, costs by each metric, as a share of its largest;
    below it, which layers each student keeps. costs: metric -> cost by first layer."""
    with drawing(2.9 + 0.2 * len(kept) + 0.16 * len(costs)) as figure:
        heights = [6, 0.5 * len(kept)] if kept else [1]
        panel, *rows = numpy.atleast_1d(figure.subplots(len(heights), height_ratios=heights, sharex=True))
        for place, (metric, values) in enumerate(costs.items()):
            largest = max(map(abs, values), default=0.0)
            shares = [value / (largest or 1.0) for value in values]
            label = f"{metric.replace('_', ' ')} (1 = {largest:.3g})"
            panel.plot(
                range(len(shares)), shares, "osD^v"[place % 5], ls="-", lw=1.2, ms=4, color=color(place), label=label
            )
        panel.axhline(0, color=FAINT, lw=0.8)
        panel.set_xlim(-0.5, layers - 0.5)
        panel.set_ylabel("share of the largest")
        panel.grid(lw=0.6)
        for row in rows:
            for place, (student, stays) in enumerate(kept.items()):
                gone = [layer for layer in range(layers) if layer not in stays]
                row.plot(stays, [place] * len(stays), "s", color=color(shades[student]), ms=6)
                row.plot(gone, [place] * len(gone), "x", color=FAINT, ms=5)
            row.set_yticks(range(len(kept)), [*kept])
            row.set_ylim(len(kept) - 0.5, -0.5)
            row.tick_params(axis="y", length=0)
            row.spines[["left"]].set_visible(False)
        last = rows[-1] if rows else panel
        _whole_numbers(last.xaxis, layers)
        last.set_xlabel("layer" if length == 1 else f"first of the {length} layers left out")
        figure.legend(loc="outside lower left", ncols=1)
        said = (_least_and_most(metric, values, length) for metric, values in costs.items())
        stays_words = (f" {student} keeps the layers {', '.join(map(str, stays))}." for student, stays in kept.items())
        return inline(name, figure, title, f"{title}. {' '.join(said)}{''.join(stays_words)}")


def margins(name: str, title: str, rows: Mapping[str, Sequence[float]], tolerance: float) -> str:
    """The relative gaps between the last kept and the first dropped score of every cut. rows: axis and student -> its
    margins. A line stands where the scores' own tolerance is."""
    with drawing(1.15 + 0.26 * len(rows)) as figure:
        panel = figure.subplots()
        for place, values in enumerate(rows.values()):
            shown = [max(value, 1e-9) for value in values]
            panel.plot(shown, [place] * len(shown), "|", color=INK, ms=11, mew=1.2)
        panel.axvline(2 * tolerance, color=color(5), lw=1.4, label="what two layouts' scores may differ by")
        panel.set_xscale("log")
        panel.minorticks_off()
        panel.set_yticks(range(len(rows)), [*rows])
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.tick_params(axis="y", length=0)
        panel.set_xlabel("margin: gap / last score kept")
        panel.grid(axis="x", lw=0.6)
        figure.legend(loc="outside lower left")
        told = (f"{label}: {len(values)} cuts, the narrowest {min(values):.2g}" for label, values in rows.items())
        return inline(name, figure, title, f"{title}. {'; '.join(told)}. The scores' tolerance is {tolerance:.1g}.")


def _image(figure: Any, panel: Any, shares: numpy.ndarray, label: str, *, gamma: float = 1.0, **place: Any) -> None:
    """gamma: below 1 it spreads small shares, where a few large ones would leave all others dark."""
    from matplotlib.colors import PowerNorm

    norm = PowerNorm(gamma, 0, 1)
    image = panel.imshow(shares, aspect="auto", cmap="viridis", norm=norm, interpolation="none", **place)
    ticks = [0, 0.25, 0.5, 0.75, 1] if gamma == 1 else [0, 0.05, 0.2, 0.5, 1]
    bar = figure.colorbar(image, ax=panel, pad=0.02, fraction=0.05, aspect=14, ticks=ticks, format="{x:g}")
    bar.outline.set_visible(False)
    bar.minorticks_off()
    bar.set_label(label)
    for side in panel.spines.values():
        side.set_visible(False)


def _layer_axis(panel: Any, layers: int) -> None:
    panel.set_ylabel("layer")
    panel.set_ylim(layers - 0.5, -0.5)
    _whole_numbers(panel.yaxis, layers)


def _whole_numbers(axis: Any, count: int) -> None:
    """Ticks at whole numbers alone: at each where they are few."""
    from matplotlib.ticker import FixedLocator, MaxNLocator

    few = count <= LAYERS_LABELLED
    locator = FixedLocator(range(count)) if few else MaxNLocator(nbins=9, integer=True, steps=[1, 2, 4, 5, 8, 10])
    axis.set_major_locator(locator)


def _share_of_row(scores_LN: numpy.ndarray) -> numpy.ndarray:
    largest = numpy.abs(scores_LN).max(axis=1, keepdims=True)
    return numpy.clip(scores_LN / numpy.where(largest > 0, largest, 1.0), 0, 1)


def _averaged(shares: numpy.ndarray) -> numpy.ndarray:
    """At most WIDEST cells in a row, each the mean of those that it stands for."""
    count = shares.shape[1]
    if count <= WIDEST:
        return shares
    edges = numpy.linspace(0, count, WIDEST + 1).astype(int)
    return numpy.add.reduceat(shares, edges[:-1], axis=1) / numpy.diff(edges)


def _told(title: str, scores_LN: numpy.ndarray, what: str) -> str:
    layers, count = scores_LN.shape
    layer, index = numpy.unravel_index(scores_LN.argmax(), scores_LN.shape)
    low_layer, low = numpy.unravel_index(scores_LN.argmin(), scores_LN.shape)
    return (
        f"{title}: {layers} layers of {count:,}. The largest score is {scores_LN.max():.4g}, of {what} {index} in "
        f"layer {layer}; the smallest {scores_LN.min():.4g}, of {what} {low} in layer {low_layer}."
    )


def _least_and_most(metric: str, values: Sequence[float], length: int) -> str:
    least, most = min(range(len(values)), key=values.__getitem__), max(range(len(values)), key=values.__getitem__)
    what = "layer" if length == 1 else f"{length} layers from"
    told = f"{what} {least} costs least, {values[least]:.4g}, {what} {most} most, {values[most]:.4g}"
    return f"{metric.replace('_', ' ').capitalize()}: {told}."
