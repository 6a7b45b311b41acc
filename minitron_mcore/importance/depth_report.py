"""The cost of leaving out layers and blocks, as text, CSV and a plot."""

from __future__ import annotations

import csv
import io
import itertools
import math
from pathlib import Path
from typing import Any

import numpy

from minitron_mcore.files import write_figure, write_whole
from minitron_mcore.importance.config import TASK_METRICS
from minitron_mcore.importance.depth import DepthTable
from minitron_mcore.importance.scores import Scores
from minitron_mcore.tables import table as tabulate


def rows_of(scores: Scores, table: DepthTable) -> list[dict[str, Any]]:
    """The whole model, then every block: by length, then by first layer.

    Columns: length, first_layer, last_layer (the first layer is 0); block_influence; each metric, as in `scores.depth`
    (larger is worse); and, where measured, the model's own numbers without the block: lm_loss_without,
    perplexity_without, accuracy_without, normalized_accuracy_without. The whole model has only the latter.
    """
    names, lengths = _names_and_lengths(table)
    blank = dict.fromkeys(("first_layer", "last_layer", "block_influence", *names), "")
    rows: list[dict[str, Any]] = [{"length": 0, **blank, **_left(table, dict.fromkeys(names, 0.0))}]
    for length in lengths:
        influence = scores.depth_of("block_influence", length)
        for start in range(len(influence)):
            damage = {name: float(table.damage[f"{name}@{length}"][start]) for name in names}
            place = {"length": length, "first_layer": start, "last_layer": start + length - 1}
            rows.append({**place, "block_influence": float(influence[start]), **damage, **_left(table, damage)})
    return rows


def _names_and_lengths(table: DepthTable) -> tuple[list[str], list[int]]:
    measured = [name.split("@") for name in table.damage]
    return [*dict.fromkeys(name for name, _ in measured)], [*dict.fromkeys(int(length) for _, length in measured)]


def _left(table: DepthTable, damage: dict[str, float]) -> dict[str, float]:
    """The model's own numbers after the damage."""
    left = {}
    for name, value in table.whole.items():
        left[f"{name}_without"] = value - damage[name] if name in TASK_METRICS else value + damage[name]
        if name == "lm_loss":
            left["perplexity_without"] = math.exp(min(left["lm_loss_without"], 700.0))
    return left


def depth_text(scores: Scores, table: DepthTable) -> str:
    """One table for each block length."""
    whole, *rows = rows_of(scores, table)
    columns = [name for name in whole if name not in ("length", "first_layer", "last_layer")]

    def cells(row: dict[str, Any]) -> list[str]:
        first, last = row["first_layer"], row["last_layer"]
        label = "none" if first == "" else str(first) if first == last else f"{first}-{last}"
        return [label, *("" if row[name] == "" else f"{row[name]:.5g}" for name in columns)]

    lines: list[str] = []
    for length, group in itertools.groupby(rows, key=lambda row: row["length"]):
        lines.append(f"without {length} layer{'s' if length > 1 else ''} (the first is 0):")
        lines.append(tabulate([cells(row) for row in (whole, *group)], ("layers", *columns)))
    return "\n".join(lines)


def write_csv(scores: Scores, table: DepthTable, path: Path) -> None:
    """All rows, with every digit; whole or not at all. One process calls."""
    rows, text = rows_of(scores, table), io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([rows[0], *([row[name] for name in rows[0]] for row in rows)])
    write_whole(path, text.getvalue())


def write_plot(scores: Scores, table: DepthTable, path: Path) -> None:
    """A panel for each block length, every metric as a share of its own largest entry in that panel; PNG, whole or not
    at all. One process calls."""
    # Takes a second to import. Without pyplot there is no window system to ask for.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names, lengths = _names_and_lengths(table)
    layers = scores.architecture.num_layers
    figure = Figure(figsize=(min(6 + 0.15 * layers, 20), 3.2 * len(lengths)), layout="constrained")
    for panel, length in zip(figure.subplots(len(lengths), squeeze=False)[:, 0], lengths, strict=True):
        for name, marker in zip(["block_influence", *names], "osv^Dx", strict=False):
            values = scores.depth_of(name, length) if name == "block_influence" else table.damage[f"{name}@{length}"]
            largest = float(numpy.abs(values).max())
            label = f"{name.replace('_', ' ')} (1 = {largest:.3g})"
            # The two logit metrics differ only in scale: dashes let both show.
            style = "--" if name.startswith("normalized") else "-"
            heights = values / (largest or 1.0)
            panel.plot(range(len(values)), heights, style, marker=marker, markersize=4, lw=1.4, label=label)
        panel.axhline(0, color="0.7", lw=0.8, zorder=0)
        panel.set_xlim(-0.5, layers - 0.5)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_xlabel("layer left out" if length == 1 else f"first of the {length} layers left out")
        panel.set_ylabel("harm done, share of the largest")
        panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    write_figure(path, figure)
